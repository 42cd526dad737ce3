"""What must hold before a sweep begins: options that go together, a store that has what is asked for, a cluster too."""

from collections.abc import Sequence
from typing import Any

from kac.guidance import check_guidance
from kac.metrics import quality_metrics
from kac.model import CONFIG_FILE, load_teacher_config
from kac.util import files
from kac.util.errors import ArgumentError, DistillKacError
from pipeline import distill, store, training
from pipeline.cluster import connection as cluster
from pipeline.cluster import placement
from pipeline.config.specs import SweepSpec
from pipeline.sweep import space
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.space import Point

REPORTED = ("validation/energy_distance", "validation/endpoint_error", "loss")
"""What a trial reports while it trains; of all of them lower is better."""


def judged_by(spec: SweepSpec) -> tuple[str, str]:
    """The metric that says which student is best, and whether lower or higher is better.

    Raises:
        ArgumentError: nothing reports it.
    """
    known = dict.fromkeys(REPORTED, "lower")
    default = REPORTED[0]
    if spec.samples:
        made = {metric.name: metric.better for metric in quality_metrics(spec.features).values() if metric.better}
        known, default = {**known, **made}, f"frechet_distance_{spec.features[-1]}"
        default = default if default in known else next(iter(made))
    metric = spec.metric or default
    for option, name, allowed in (("`metric`", metric, known), ("`asha_metric`", spec.asha_metric, REPORTED)):
        if name not in allowed:
            without = "" if spec.samples else ", since `samples` 0 leaves the students unevaluated"
            raise ArgumentError(
                f"{option}: expected a metric that is reported ({', '.join(allowed)}){without}, found {name}"
            )
    return metric, known[metric]


def _goes_by_reports(spec: SweepSpec) -> str:
    """The option for which trials must report ``asha_metric``; empty: none."""
    return "`asha`" if spec.asha else "`searcher` optuna" if spec.search and spec.searcher == "optuna" else ""


def check_options(spec: SweepSpec) -> None:
    """Refuse options that do not go together."""
    if bool(spec.search) != bool(spec.trials):
        has, lacks = ("`search`", "`trials`") if spec.search else ("`trials`", "`search`")
        raise ArgumentError(f"{lacks}: expected it beside {has}, found none")
    if spec.asha and spec.workers:
        raise ArgumentError("`asha`: expected trials that train in their own process, found `workers`: leave one out")
    if spec.chain and (spec.asha or spec.search or spec.objective.kind == "flow-map"):
        raise ArgumentError("`chain`: expected a grid of students of one step count each, without `asha` and `search`")


def check_validated(spec: SweepSpec) -> None:
    """Refuse to go by a validation that is not made."""
    needs = _goes_by_reports(spec)
    if not needs:
        return
    if spec.asha_metric.startswith("validation/") and spec.validation_updates == 0:
        raise ArgumentError(f"`validation_updates`: expected some for {needs} on {spec.asha_metric}, found 0")
    if spec.asha_metric.endswith("endpoint_error") and not spec.held_out_rows:
        raise ArgumentError(f"`held_out_rows`: expected some for {needs} on {spec.asha_metric}, found none")


def check_reported(spec: SweepSpec, ledger: Ledger) -> None:
    """Refuse to have gone by a metric that no trial has reported.

    Raises:
        DistillKacError: it names the metric.
    """
    needs = _goes_by_reports(spec)
    ended = [record for record in ledger.records if record.status in {"finished", "stopped"}]
    if needs and ended and not any(spec.asha_metric in record.metrics for record in ended):
        raise DistillKacError(
            f"{spec.out}: expected {spec.asha_metric} from the trials for {needs}, found that none has reported it: "
            "choose another `asha_metric`"
        )


def check_store(spec: SweepSpec, points: Sequence[Point]) -> tuple[store.Store, list[float]]:
    """The store, and the guidance scales that it lacks; all that can be checked without them is.

    Raises:
        DistillKacError: something does not fit, or scales are missing and ``rollout`` is not given.
    """
    source = store.open(spec.store)
    if spec.asha and any(point.spec.optimizer.updates <= spec.grace_updates for point in points):
        raise ArgumentError(f"`grace_updates`: expected less than all updates of a trial, found {spec.grace_updates}")
    wanted = dict.fromkeys(point.spec.guidance for point in points)
    missing = [w for w in wanted if w != "all" and w not in source.guidance]
    assert source.manifest is not None
    teacher = spec.teacher or source.manifest.teacher
    if missing and (spec.rollout or files.exists(files.join(teacher, CONFIG_FILE))):
        check_guidance(load_teacher_config(teacher), missing)
    if missing and not spec.rollout:
        raise ArgumentError(
            f"`guidance`: expected scales of the store {spec.store} ({', '.join(f'{w:g}' for w in source.guidance)}), "
            f"found {', '.join(f'{w:g}' for w in missing)} missing: add `rollout` to have them added first"
        )
    if spec.search and any(isinstance(draw, space.Uniform) for draw in _drawn(spec, "guidance")):
        raise ArgumentError(
            "`search` guidance: expected choice(...) of scales, found a range: a store has some of them"
        )
    checked: set[tuple[Any, ...]] = set()
    for point in points:
        training.check_shares(point.spec.optimizer, point.spec.workers or 0)
        # A chain's student starts from one that is not there yet; it is checked again when it starts.
        init = spec.init if point.after else point.spec.init
        student = distill.resolve(point.spec.model_copy(update={"init": init}))
        key = (student.objective, student.steps, student.guidance, student.refine, student.init)
        if student.guidance not in missing and key not in checked:
            checked.add(key)
            distill.check(student)
    return source, missing


def _drawn(spec: SweepSpec, field: str) -> list[space.Draw]:
    return [draw for name, draw in space.draws_of(spec).items() if name == field]


def await_room(spec: SweepSpec) -> None:
    """Return once the cluster has room for a trial; raises as ``placement.await_room``."""
    share = share_of_trial(spec, cluster.connect())
    option, count = ("`workers`", spec.workers) if spec.workers else ("`cpus_per_trial`, `gpus_per_trial`", 1)
    placement.await_room("sweep", option, count, share)


def share_of_trial(spec: SweepSpec, resources: cluster.Resources) -> placement.Share:
    """What a trial takes of a node, or each of its workers."""
    return placement.Share(spec.cpus_per_trial, gpus_a_trial(spec, resources), spec.label_selector)


def gpus_a_trial(spec: SweepSpec, resources: cluster.Resources) -> float:
    """GPUs that a trial takes, or the share of one."""
    return spec.gpus_per_trial if spec.gpus_per_trial is not None else min(1, resources.gpus)
