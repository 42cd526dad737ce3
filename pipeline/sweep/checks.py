"""Checks before a sweep begins: conflicting options, the store, and the resources of the cluster."""

from collections.abc import Sequence
from typing import Any

from kac.guidance import check_guidance
from kac.metrics import quality_metrics
from kac.model import CONFIG_FILE, load_teacher_config
from kac.util import files
from kac.util.errors import ArgumentError, DistillKacError
from pipeline import store, training
from pipeline.cluster import connection as cluster
from pipeline.cluster import placement
from pipeline.config import SweepSpec
from pipeline.distill import plan_student, resolve_spec
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.planned_trials import PlannedTrial
from pipeline.sweep.proposers import PROPOSERS, is_choice, search_space

REPORTED = ("validation/energy_distance", "validation/endpoint_error", "loss")
"""Metrics that a trial reports during training. Lower is better for all of these metrics."""


def ranking_metric(spec: SweepSpec) -> tuple[str, str]:
    """Return the name of the metric that ranks the students, and "lower" or "higher", whichever is better."""
    known: dict[str, str] = dict.fromkeys(REPORTED, "lower")
    default = REPORTED[0]
    if spec.samples:
        evaluated = {metric.name: metric.better for metric in quality_metrics(spec.features).values() if metric.better}
        known, default = {**known, **evaluated}, f"frechet_distance_{spec.features[-1]}"
        default = default if default in known else next(iter(evaluated))
    metric = spec.metric or default
    for option, name, allowed in (("`metric`", metric, known), ("`asha_metric`", spec.asha_metric, REPORTED)):
        if name not in allowed:
            reason = "" if spec.samples else " With `samples` 0, students are not evaluated."
            raise ArgumentError(
                f"{option} is {name}, which this sweep does not report.{reason} Choose one of: {', '.join(allowed)}."
            )
    return metric, known[metric]


def check_options(spec: SweepSpec) -> None:
    """Raise ``ArgumentError`` if options conflict."""
    if bool(spec.search) != bool(spec.trials):
        given, missing = ("`search`", "`trials`") if spec.search else ("`trials`", "`search`")
        raise ArgumentError(f"{missing} is required with {given}.")
    if spec.asha and spec.workers:
        raise ArgumentError("`asha` cannot stop trials that train on Ray Train workers. Drop `asha` or `workers`.")
    if spec.chain and (spec.asha or spec.search or spec.objective.kind == "flow-map"):
        raise ArgumentError(
            "`chain` needs a grid of students with fixed step counts. Drop `asha`, `search` and `objective.kind` "
            "flow-map."
        )
    user = _user_of_reports(spec)
    needed = {
        "validation_updates": spec.asha_metric.startswith("validation/"),
        "held_out_rows": spec.asha_metric.endswith("endpoint_error"),
    }
    for option, is_needed in needed.items():
        if user and is_needed and getattr(spec, option) == 0:
            raise ArgumentError(f"`{option}` is 0, but {user} compares trials by {spec.asha_metric}. Choose 1 or more.")


def check_reported(spec: SweepSpec, ledger: Ledger) -> None:
    """Raise ``DistillKacError`` if no trial has reported the metric that ASHA or the search needs."""
    user = _user_of_reports(spec)
    ended = [record for record in ledger.records if not record.is_open]
    if user and ended and not any(spec.asha_metric in record.metrics for record in ended):
        raise DistillKacError(
            f"{spec.out}: no trial reported {spec.asha_metric}, which {user} needs. Choose another `asha_metric`."
        )


def _user_of_reports(spec: SweepSpec) -> str:
    """The option that makes the sweep use ``asha_metric``; empty if no option does."""
    if spec.asha:
        return "`asha`"
    return f"`searcher` {spec.searcher}" if spec.search and PROPOSERS[spec.searcher].uses_reports else ""


def check_store(spec: SweepSpec, trials: Sequence[PlannedTrial]) -> tuple[store.Store, list[float]]:
    """Check every student against the store; return the store, and the guidance scales that it lacks.

    A student at a missing scale is checked when its trial starts.
    """
    source = store.open(spec.store)
    shortest = min(trial.spec.optimizer.updates for trial in trials)
    if spec.asha and shortest <= spec.grace_updates:
        raise ArgumentError(
            f"`grace_updates` is {spec.grace_updates}, but a trial has only {shortest} updates. Choose a smaller value."
        )
    wanted = dict.fromkeys(trial.spec.guidance for trial in trials)
    missing = [w for w in wanted if w != "all" and w not in source.guidance]
    assert source.manifest is not None
    teacher = spec.teacher or source.manifest.teacher
    if missing and (spec.rollout or files.exists(files.join(teacher, CONFIG_FILE))):
        check_guidance(load_teacher_config(teacher), missing)
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
        training.check_batch_split(trial.spec.optimizer, trial.spec.workers or 0)
        # The previous student of a chain does not exist yet. It is checked when the trial starts.
        init = spec.init if trial.after else trial.spec.init
        student = resolve_spec(trial.spec.model_copy(update={"init": init}))
        key = (student.objective, student.steps, student.guidance, student.refine, student.init)
        if student.guidance not in missing and key not in checked:
            checked.append(key)
            plan_student(student)
    return source, missing


def resources_per_trial(spec: SweepSpec) -> placement.Resources:
    """The resources of one trial, or of each worker if `workers` is set. Connects to Ray. GPUs may be fractional."""
    available = cluster.connect().gpus
    gpus = min(1, available) if spec.gpus_per_trial is None else spec.gpus_per_trial
    return placement.Resources(spec.cpus_per_trial, gpus, spec.label_selector)
