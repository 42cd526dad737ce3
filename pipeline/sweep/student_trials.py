"""The students of a sweep: trials that distill one store."""

import functools
from collections.abc import Sequence
from typing import Any

from kac.data import DataConfig
from kac.guidance import check_guidance
from kac.model import CONFIG_FILE, load_teacher_config
from kac.util import files
from kac.util.errors import ArgumentError
from pipeline import store, tracking, training
from pipeline.cluster import storage
from pipeline.config import STEP_COUNTS, DistillSpec, EvaluateSpec, RolloutRecipe, RolloutSpec, SweepSpec
from pipeline.distill import (
    check_paths,
    distill,
    finish_stopped_student,
    objective_of,
    plan_student,
    resolve_spec,
    start_student_run,
)
from pipeline.rollout.rollout_stage import rollout
from pipeline.store.columns import load, merge_selections, use_shared
from pipeline.sweep.planned_trials import PlannedTrial
from pipeline.sweep.proposers import is_choice, search_space
from pipeline.sweep.trial_kind import ResolvedTrial, TrialKind


class StudentTrials(TrialKind):
    """Students of one store."""

    noun, made_by = "student", "rollout"

    def __init__(self, spec: SweepSpec) -> None:
        self.spec: SweepSpec = check_paths(spec, lambda: True)

    def check(self, trials: Sequence[PlannedTrial]) -> None:
        """Check every student against the store. A student at a missing scale is checked when its trial starts."""
        spec, source = self.spec, store.open(self.spec.store)
        wanted = dict.fromkeys(trial.spec.guidance for trial in trials)
        missing = [w for w in wanted if w != "all" and w not in source.guidance]
        assert source.manifest is not None
        self.manifest, self.missing = source.manifest, missing
        self.teacher = spec.teacher or source.manifest.teacher
        self.inputs = {"store": source.manifest.fingerprint}
        self.dataset = tracking.LoggedDataset("store", source.manifest.fingerprint, spec.store)
        if missing and (spec.rollout or files.exists(files.join(self.teacher, CONFIG_FILE))):
            check_guidance(load_teacher_config(self.teacher), missing)
        if missing and not spec.rollout:
            raise ArgumentError(
                f"`guidance` {', '.join(f'{w:g}' for w in missing)} is not in the store {spec.store}, which has "
                f"{', '.join(f'{w:g}' for w in source.guidance)}. Add `rollout` to compute the missing scales first."
            )
        if spec.search and not is_choice(search_space(spec)["guidance"]):
            raise ArgumentError(
                "`search` draws guidance from a range, but a store has only certain guidance scales. Use choice(...)."
            )
        checked: list[Any] = []
        for trial in trials:
            # The previous student of a chain does not exist yet. It is checked when the trial starts.
            init = spec.init if trial.after else trial.spec.init
            student = resolve_spec(trial.spec.model_copy(update={"init": init}))
            key = (student.objective, student.steps, student.guidance, student.refine, student.init)
            if student.guidance not in missing and key not in checked:
                checked.append(key)
                plan_student(student)
        storage.check_shared({"`teacher`": self.teacher}, lambda: True)

    def add_inputs(self) -> None:
        """Add missing guidance scales to the store, with the store's recipe and sample ids.

        The rollout's run is not a child of the sweep's run, so a chart of the child runs compares only students.
        """
        manifest = self.manifest
        recipe = {name: getattr(manifest.identity, name) for name in RolloutRecipe.model_fields}
        for start, stop in manifest.ids(manifest.guidance[0]) if self.missing else ():
            rollout(
                RolloutSpec(
                    teacher=self.teacher,
                    store=self.spec.store,
                    first_sample=start,
                    trajectories=stop - start,
                    guidance=tuple(self.missing),
                    label_selector=self.spec.label_selector,
                    **recipe,
                )
            )

    def share(self, trials: Sequence[DistillSpec]) -> list[Any]:
        """Put the columns that the students read into Ray's object store, so that a node's trials share them.

        Returns an empty list if trials have workers, or if the columns exceed ``memory_gib`` or the object store. In
        that case, each trial reads the store.
        """
        import ray  # not needed by jobs without Ray, which import this module

        spec, source = self.spec, store.open(self.spec.store)
        wanted = [
            source.without_last(s.held_out_rows).selection(
                objective_of(s), source.guidance if s.guidance == "all" else s.guidance
            )
            for s in trials
        ]
        selections = merge_selections(wanted)
        size = sum(selection.bytes for selection in selections)
        shared_memory = min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"])
        if spec.workers or size > min(spec.memory_gib * 2**30, 0.8 * shared_memory):
            return []
        return [ray.put(load(selection)) for selection in selections]

    def resolve(self, trial: PlannedTrial) -> ResolvedTrial | None:
        """Resolve a student; return None if its predecessor in a chain does not exist yet."""
        spec = resolve_spec(trial.spec)
        if trial.after and not files.exists(files.join(spec.init, CONFIG_FILE)):
            return None
        plan = plan_student(spec)
        start_run = functools.partial(start_student_run, spec, plan)
        return ResolvedTrial(spec, plan.content, start_run, lambda: finish_stopped_student(spec))

    def train(
        self, spec: DistillSpec, run: tracking.TrackedRun, on_report: training.OnReport, shared: Sequence[Any]
    ) -> None:
        """Train a student."""
        with use_shared(shared):
            distill(spec, run, on_report, is_trial=True)

    def data(self) -> DataConfig:
        """The teacher's data."""
        return load_teacher_config(self.teacher).data

    def evaluations(self, folders: Sequence[str]) -> list[EvaluateSpec]:
        """One evaluation of all students, and of the teacher as it was sampled for the store."""
        identity, counts = self.manifest.identity, self.spec.steps or self.spec.grid.get("steps", STEP_COUNTS)
        return [
            self._evaluation(
                teacher=self.teacher,
                students=tuple(folders),
                out=files.join(self.spec.out, "evaluation"),
                steps=tuple(map(int, counts)),  # of any-step students
                solver=identity.solver,
                solver_steps=identity.solver_steps,
                knot_grid=identity.knot_grid,
                time_factor=identity.time_factor,
            )
        ]
