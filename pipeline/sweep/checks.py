"""Checks before a sweep begins: conflicting options, and the resources of the cluster."""

from collections.abc import Sequence

from kac.metrics import quality_metrics
from kac.metrics.features import space_name
from kac.util.errors import ArgumentError, DistillKacError
from pipeline import training
from pipeline.cluster import connection as cluster
from pipeline.cluster import placement
from pipeline.config import AnySweep, SweepSpec, TeachSweepSpec
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.planned_trials import PlannedTrial
from pipeline.sweep.proposers import PROPOSERS

ENDPOINT_ERROR = "validation/endpoint_error"  # only of students
REPORTED = ("validation/energy_distance", ENDPOINT_ERROR, "loss")
"""Metrics that a trial reports during training. Lower is better for all of these metrics."""

OF_STUDENTS = ("frechet_ratio", "endpoint_error", "nfe")
"""Starts of the names of metrics that cannot rank teachers, because teachers lack them or have equal values."""


def ranking_metric(spec: AnySweep) -> tuple[str, str]:
    """Return the name of the metric that ranks the trials, and "lower" or "higher", whichever is better."""
    reported = [name for name in REPORTED if name != ENDPOINT_ERROR or isinstance(spec, SweepSpec)]
    known: dict[str, str] = dict.fromkeys(reported, "lower")
    default = REPORTED[0]
    if spec.samples:
        spaces = [space_name(given) for given in spec.features]
        few, many = quality_metrics(spaces, floor_count=1), quality_metrics(spaces)
        # Some metrics exist only with fewer, or only with at least as many, held-out images as samples.
        evaluated = {name: metric.better for name, metric in many.items() if metric.better and name in few}
        if isinstance(spec, TeachSweepSpec):  # these metrics compare a student with its teacher
            evaluated = {name: better for name, better in evaluated.items() if not name.startswith(OF_STUDENTS)}
        known, default = {**known, **evaluated}, f"frechet_distance_{spaces[-1]}"
        default = default if default in known else next(iter(evaluated))
    metric = spec.metric or default
    for option, name, allowed in (("`metric`", metric, known), ("`asha_metric`", spec.asha_metric, reported)):
        if name not in allowed:
            reason = "" if spec.samples else " With `samples` 0, models are not evaluated."
            raise ArgumentError(
                f"{option} is {name}, which this sweep does not report.{reason} Choose one of: {', '.join(allowed)}."
            )
    return metric, known[metric]


def check_options(spec: AnySweep, trials: Sequence[PlannedTrial]) -> None:
    """Raise ``ArgumentError`` if options conflict."""
    if bool(spec.search) != bool(spec.trials):
        given, missing = ("`search`", "`trials`") if spec.search else ("`trials`", "`search`")
        raise ArgumentError(f"{missing} is required with {given}.")
    if spec.asha and spec.workers:
        raise ArgumentError("`asha` cannot stop trials that train on Ray Train workers. Drop `asha` or `workers`.")
    if isinstance(spec, SweepSpec) and spec.chain and (spec.asha or spec.search or spec.objective.is_any_step):
        raise ArgumentError(
            "`chain` needs a grid of students with fixed step counts. Drop `asha` and `search`, and set `objective` to "
            "endpoint."
        )
    user = _user_of_reports(spec)
    needed = {
        "validation_updates": spec.asha_metric.startswith("validation/"),
        "held_out_rows": spec.asha_metric == ENDPOINT_ERROR,
    }
    for option, is_needed in needed.items():
        if user and is_needed and getattr(spec, option) == 0:
            raise ArgumentError(f"`{option}` is 0, but {user} compares trials by {spec.asha_metric}. Choose 1 or more.")
    shortest = min(trial.spec.optimizer.updates for trial in trials)
    if spec.asha and shortest <= spec.grace_updates:
        raise ArgumentError(
            f"`grace_updates` is {spec.grace_updates}, but a trial has only {shortest} updates. Choose a smaller value."
        )
    for trial in trials:
        training.check_batch_split(trial.spec.optimizer, trial.spec.workers or 0)


def check_reported(spec: AnySweep, ledger: Ledger) -> None:
    """Raise ``DistillKacError`` if no trial has reported the metric that ASHA or the search needs."""
    user = _user_of_reports(spec)
    ended = [record for record in ledger.records if not record.is_open]
    if user and ended and not any(spec.asha_metric in record.metrics for record in ended):
        raise DistillKacError(
            f"{spec.out}: no trial reported {spec.asha_metric}, which {user} needs. Choose another `asha_metric`."
        )


def _user_of_reports(spec: AnySweep) -> str:
    """The option that makes the sweep use ``asha_metric``; empty if no option does."""
    if spec.asha:
        return "`asha`"
    return f"`searcher` {spec.searcher}" if spec.search and PROPOSERS[spec.searcher].uses_reports else ""


def resources_per_trial(spec: AnySweep) -> placement.Resources:
    """The resources of one trial, or of each worker if `workers` is set. Connects to Ray. GPUs may be fractional."""
    available = cluster.connect().gpus
    gpus = min(1, available) if spec.gpus_per_trial is None else spec.gpus_per_trial
    return placement.Resources(spec.cpus_per_trial, gpus, spec.label_selector)
