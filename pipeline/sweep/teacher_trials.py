"""The teachers of a sweep: trials that train on one dataset."""

import functools
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from kac.data import DataConfig, open_dataset
from kac.networks.cost import network_cost
from kac.util import files
from kac.util.device import default_device
from kac.util.errors import ArgumentError
from pipeline import decode, outputs, tracking, training
from pipeline.cluster import connection as cluster
from pipeline.cluster import storage
from pipeline.config import EvaluateSpec, TeachSpec, TeachSweepSpec
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.planned_trials import UPDATES, PlannedTrial, plan_trial
from pipeline.sweep.trial_kind import ResolvedTrial, TrialKind
from pipeline.teach import TeachTask, resolve_spec, teach

WARMUP_UPDATES = 5
"""Updates before the measurement of the time per update."""

LEAST_UPDATES, LEAST_SECONDS = 20, 2.0
"""The measurement takes at least as many updates and seconds."""


class TeacherTrials(TrialKind):
    """Teachers of one dataset."""

    noun, made_by = "teacher", "data"

    def __init__(self, spec: TeachSweepSpec) -> None:
        self.spec: TeachSweepSpec = cluster.absolute_paths(spec, "out", "data.root", "data.autoencoder")
        paths = {"`out`": self.spec.out, **self.spec.data.paths(), **storage.cache_of()}
        storage.check_shared(paths, lambda: True, writes_to_mlflow=self.spec.out)

    def check(self, trials: Sequence[PlannedTrial]) -> None:
        """Check every teacher's network against the data, and decode the data."""
        spec = self.spec
        if spec.budget_seconds:
            if any(UPDATES in trial.values for trial in trials):
                raise ArgumentError(f"`budget_seconds` determines {UPDATES}. Do not vary {UPDATES} as well.")
            has_guide = any(trial.spec.guide_updates for trial in trials)
            for option, is_given in (("asha", spec.asha), ("workers", spec.workers), ("guide_updates", has_guide)):
                if is_given:
                    raise ArgumentError(f"`budget_seconds` cannot be combined with `{option}`. Leave one of them out.")
        plain = spec.data.model_copy(update={"horizontal_flip": False})
        for trial in trials:
            if trial.spec.data.model_copy(update={"horizontal_flip": False}) != plain:
                raise ArgumentError(
                    "`grid` or `search` varies the data, but a sweep compares teachers of the same data. Of `data`, "
                    "only `data.horizontal_flip` can vary."
                )
        description = decode.open_described("sweep", spec.data)
        self.inputs = {"data_sha256": description.sha256}
        self.dataset = tracking.LoggedDataset(spec.data.kind, description.sha256, spec.data.origin)
        for network in {trial.spec.network.model_dump_json(): trial.spec.network for trial in trials}.values():
            network_cost(network, description.sample_shape, description.num_classes)

    def replan(self, trial: PlannedTrial, ledger: Ledger) -> PlannedTrial:
        """Return the trial with the number of updates in its record."""
        record = ledger.get(trial.name)
        return plan_trial(self.spec, record.values, record.name) if record else trial

    def resolve(self, trial: PlannedTrial) -> ResolvedTrial:
        """Resolve a teacher."""
        spec = resolve_spec(trial.spec)
        description = open_dataset(spec.data).description
        start_run = functools.partial(outputs.teacher_run, spec, description, self.inputs, is_trial=True)
        return ResolvedTrial(spec, self.inputs, start_run, lambda: outputs.finish_run(spec.out))

    def measured_updates(self, spec: TeachSpec) -> int | None:
        """Return the number of updates that take ``budget_seconds``. Each trial measures it once, for its record."""
        if self.spec.budget_seconds is None:
            return None
        record = Ledger(self.spec.out).get(spec.out.rsplit("/", 1)[-1])
        return (record and record.values.get(UPDATES)) or updates_within(spec, self.spec.budget_seconds)

    def train(
        self, spec: TeachSpec, run: tracking.TrackedRun, on_report: training.OnReport, shared: Sequence[Any]
    ) -> None:
        """Train a teacher."""
        teach(spec, run, on_report, is_trial=True)

    def data(self) -> DataConfig:
        """The teachers' data."""
        return self.spec.data

    def evaluations(self, folders: Sequence[str]) -> list[EvaluateSpec]:
        """One evaluation per teacher. Teachers share the cached features of real images."""
        parent = files.join(self.spec.out, "evaluation")
        return [
            self._evaluation(
                teacher=folder,
                out=files.join(parent, folder.rsplit("/", 1)[-1]),
                solver=self.spec.solver,
                solver_steps=self.spec.solver_steps,
                knot_grid=self.spec.knot_grid,
                time_factor=self.spec.time_factor,
            )
            for folder in folders
        ]


def updates_within(spec: TeachSpec, seconds: float) -> int:
    """Return the number of updates that take ``seconds`` in this process, from the median time of a few updates."""
    learner = TeachTask(spec).build(training.Worker(0, 1, default_device()))

    def update(number: int) -> float:
        next(iter(learner.update(number).losses.values())).item()  # waits for the GPU
        return time.perf_counter()

    ends = [update(number) for number in range(WARMUP_UPDATES)][-1:]
    while len(ends) <= LEAST_UPDATES or ends[-1] - ends[0] < LEAST_SECONDS:
        ends.append(update(WARMUP_UPDATES + len(ends)))
    return max(1, round(seconds / median(after - before for before, after in pairwise(ends))))
