"""The rollout stage: plan the shards, compute the missing ones, seal the store, and log the results."""

import contextlib
import time
from collections.abc import Generator, Sequence

from kac.metrics import Metric
from kac.model import load_model, load_teacher_config
from kac.util import probes
from kac.util.log import log
from kac.util.options import most
from kac.util.path_options import check_apart
from pipeline import tracking
from pipeline.cluster import connection as cluster
from pipeline.cluster import storage
from pipeline.cluster.placement import choose_actors, wait_for_capacity
from pipeline.config import RolloutSpec
from pipeline.progress import ProgressBar
from pipeline.rollout.cost import describe_cost, describe_remaining
from pipeline.rollout.plan import Plan, make_plan
from pipeline.rollout.seal import remove_orphans, seal
from pipeline.rollout.shard_maker import ShardMaker, ShardOutcome
from pipeline.rollout.teacher import endpoint_rms
from pipeline.store.manifest import Manifest
from pipeline.store.receipts import SHARDS_PER_RECEIPT_FILE, write_receipts

tracking.declare(
    Metric("trajectories", "trajectories in the store"),
    Metric("trajectories_reused", "trajectories reused from an earlier run"),
    Metric("trajectories_per_second", "rollout speed, including start-up", better="higher"),
    Metric("store_bytes", "bytes of all shards", better="lower"),
)


def rollout(spec: RolloutSpec, parent: tracking.TrackedRun | None = None) -> Manifest | None:
    """Create or extend the store ``spec.store``. Existing shards are reused.

    Returns:
        The manifest of the store, or None after a dry run.

    Raises:
        DistillKacError: the teacher or the store does not fit the spec, the store is not writable, or a shard failed.
    """
    spec = cluster.absolute_paths(spec, "store", "teacher")
    is_spread = spec.actors != 0
    storage.check_shared({"`store`": spec.store, "`teacher`": spec.teacher}, lambda: is_spread)
    if spec.source == "forward":
        root = load_teacher_config(spec.teacher).data.root
        storage.check_shared({"`data.root` of the teacher": root, **storage.cache_of(bool(root))}, lambda: is_spread)
    check_apart(spec, {"`data.root` of the teacher": load_teacher_config(spec.teacher).data.root})
    spec = spec.settled(lambda: choose_actors(spec).on_gpu)
    plan = make_plan(spec)
    cost = f"rollout: {describe_cost(plan, load_teacher_config(spec.teacher))}"
    if spec.dry_run:
        log.info(cost)
        return None
    if plan.is_done and plan.manifest is not None:
        remove_orphans(spec.store, plan.manifest.guidance)
        log.info(f"rollout: {spec.store} is complete with {plan.rows_finished:,} rows: nothing to do")
        return plan.manifest
    teacher = load_model(spec.teacher).config
    group = choose_actors(spec)
    if group.actors:
        wait_for_capacity("rollout", "`actors`", group.for_work(len(plan.todo)).actors, group.resources)
    probes.check_writable(spec.store)
    log.info(f"{cost}\nrollout: {group}, {spec.precision.resolved(group.on_gpu)}")
    with tracking.start_run(
        name=f"rollout-{teacher.data.kind}",
        spec=spec,
        fingerprint=plan.identity.fingerprint(),
        inputs={"teacher": teacher.weights_sha256},
        output=spec.store,
        parent=parent,
        datasets=[tracking.Dataset("teacher", teacher.weights_sha256, spec.teacher, context="teacher")],
    ) as run:
        started = time.perf_counter()
        rounding = compare_with_float32(spec, plan)
        outcomes = compute_shards(spec, plan)
        manifest = seal(spec, plan, outcomes, rounding)
        summary = _log_results(run, spec, plan, outcomes, time.perf_counter() - started)
    log.info(summary)  # after the lines that MLflow prints when a run ends
    return manifest


def compare_with_float32(spec: RolloutSpec, plan: Plan) -> float | None:
    """Return ``endpoint_rms``, or None if the precision is float32 or the manifest already has the value.

    Raises:
        RolloutError: the computation failed.
    """
    if spec.precision.dtype == "float32" or not plan.todo or (plan.manifest and plan.manifest.endpoint_rms is not None):
        return None
    if spec.actors == 0:
        rounding = endpoint_rms(spec, plan.identity)
    else:
        from pipeline.rollout.actors import endpoint_rms_on_ray

        rounding = endpoint_rms_on_ray(spec, plan)
    log.info(f"rollout: {spec.precision.dtype} changes endpoints by {rounding:.2g} (RMS) compared with float32")
    return rounding


def compute_shards(spec: RolloutSpec, plan: Plan) -> list[ShardOutcome]:
    """Make every shard of ``plan.todo``; return when all are published.

    Raises:
        RolloutError: a shard failed; the message names it.
    """
    if not plan.todo:
        return []
    outcomes: list[ShardOutcome] = []
    total, has_computed = sum(shard.rows for shard in plan.todo), False
    with ProgressBar("rollout", total, "trajectories") as bar, contextlib.closing(_compute(spec, plan)) as computing:
        for outcome in computing:
            is_first = outcome.computed_rows > 0 and not has_computed
            has_computed |= is_first
            outcomes.append(outcome)
            bar.update(outcome.receipt.rows)
            if is_first and bar.done < total:
                bar.write(f"rollout: {describe_remaining(outcome, total - bar.done, most(choose_actors(spec).actors))}")
            if len(outcomes) % SHARDS_PER_RECEIPT_FILE == 0:
                latest = [each.receipt for each in outcomes[-SHARDS_PER_RECEIPT_FILE:]]
                write_receipts(spec.store, plan.identity, latest)
    return outcomes


def _compute(spec: RolloutSpec, plan: Plan) -> Generator[ShardOutcome]:
    if spec.actors == 0:
        yield from map(ShardMaker(spec, plan.identity).make, plan.todo)
    else:
        from pipeline.rollout.actors import compute_on_actors

        yield from compute_on_actors(spec, plan)


def _log_results(
    run: tracking.TrackedRun, spec: RolloutSpec, plan: Plan, outcomes: Sequence[ShardOutcome], seconds: float
) -> str:
    """Log metrics to the run; return the summary line."""
    computed = sum(outcome.computed_rows for outcome in outcomes)
    reused = plan.rows_finished + sum(outcome.receipt.rows - outcome.computed_rows for outcome in outcomes)
    size = sum(receipt.bytes for receipt in (*plan.finished, *(outcome.receipt for outcome in outcomes)))
    counts = {"trajectories": computed + reused, "trajectories_reused": reused, "store_bytes": size}
    run.metrics({**counts, "trajectories_per_second": computed / seconds})
    run.tags({"distillkac.path": spec.store})
    shards_computed = sum(1 for outcome in outcomes if outcome.computed_rows)
    return (
        f"rollout: wrote {spec.store}: {computed:,} trajectories computed in {shards_computed} shards, "
        f"{reused:,} reused in {len(plan.finished) + len(outcomes) - shards_computed} shards, "
        f"{size / 2**20:.1f} MiB, {seconds:.0f} s"
    )
