"""The rollout stage: plan the shards, compute and publish missing shards, seal the store, and log the results."""

import contextlib
import math
import time
from collections.abc import Generator

import numpy as np

from kac.metrics import Metric
from kac.model import ModelConfig, load_model, load_teacher_config
from kac.networks.cost import duration, network_cost, short
from kac.solvers import evaluations
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
from pipeline.rollout.plan import Plan, make_plan, remove_orphans, seal
from pipeline.rollout.shard_maker import ShardMaker, ShardOutcome, endpoint_rms
from pipeline.store.dataset_card import write_card
from pipeline.store.manifest import SHARDS_PER_RECEIPT_FILE, Manifest, write_receipts

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
    paths = load_teacher_config(spec.teacher).data.paths(" of the teacher")
    if spec.source == "forward":
        storage.check_shared({**paths, **storage.cache_of(any(paths.values()))}, lambda: is_spread)
    check_apart(spec, paths)
    spec = spec.settled(lambda: choose_actors(spec).on_gpu)
    plan = make_plan(spec)
    cost = f"rollout: {_describe_cost(plan, load_teacher_config(spec.teacher))}"
    if spec.dry_run:
        log.info(cost)
        return None
    if plan.is_done and plan.manifest is not None:
        remove_orphans(spec.store, plan.manifest.guidance)
        if spec.license:
            write_card(spec.store, plan.manifest, license=spec.license)
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
        datasets=[tracking.LoggedDataset("teacher", teacher.weights_sha256, spec.teacher, context="teacher")],
    ) as run:
        started = time.perf_counter()
        rounding = _compare_with_float32(spec, plan)
        outcomes = compute_shards(spec, plan)
        manifest = seal(spec, plan, outcomes, rounding)
        seconds = time.perf_counter() - started
        computed = sum(outcome.computed_rows for outcome in outcomes)
        reused = plan.rows_finished + sum(outcome.receipt.rows - outcome.computed_rows for outcome in outcomes)
        size = sum(receipt.bytes for receipt in (*plan.finished, *(outcome.receipt for outcome in outcomes)))
        counts = {"trajectories": computed + reused, "trajectories_reused": reused, "store_bytes": size}
        run.metrics({**counts, "trajectories_per_second": computed / seconds})
        run.tags({"distillkac.path": spec.store})
    shards_computed = sum(1 for outcome in outcomes if outcome.computed_rows)
    log.info(  # after the lines that MLflow prints when a run ends
        f"rollout: wrote {spec.store}: {computed:,} trajectories computed in {shards_computed} shards, "
        f"{reused:,} reused in {len(plan.finished) + len(outcomes) - shards_computed} shards, "
        f"{size / 2**20:.1f} MiB, {seconds:.0f} s"
    )
    return manifest


def _compare_with_float32(spec: RolloutSpec, plan: Plan) -> float | None:
    """Return ``endpoint_rms``, or None if the precision is float32 or the manifest already has the value."""
    if spec.precision.dtype == "float32" or not plan.todo or (plan.manifest and plan.manifest.endpoint_rms is not None):
        return None
    if spec.actors == 0:
        rounding = endpoint_rms(spec, plan.identity)
    else:
        from pipeline.rollout.actors import endpoint_rms_on_ray

        rounding = endpoint_rms_on_ray(spec, plan.identity)
    log.info(f"rollout: {spec.precision.dtype} changes endpoints by {rounding:.2g} (RMS) compared with float32")
    return rounding


def compute_shards(spec: RolloutSpec, plan: Plan) -> list[ShardOutcome]:
    """Publish every shard of ``plan.todo``. If a shard fails, raise a ``RolloutError`` that names it."""
    if not plan.todo:
        return []
    outcomes: list[ShardOutcome] = []
    total, has_computed = sum(shard.rows for shard in plan.todo), False
    with ProgressBar("rollout", total, "trajectories") as bar, contextlib.closing(_compute(spec, plan)) as computing:
        for outcome in computing:
            outcomes.append(outcome)
            bar.update(outcome.receipt.rows)
            if outcome.computed_rows and not has_computed and bar.done < total:
                row_seconds = outcome.compute_seconds / outcome.computed_rows / max(1, most(choose_actors(spec).actors))
                bar.write(f"rollout: about {duration((total - bar.done) * row_seconds)} left")
            has_computed |= outcome.computed_rows > 0
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


def _describe_cost(plan: Plan, teacher: ModelConfig) -> str:
    """Describe the remaining work: trajectories, network calls, bytes, shards and FLOPs."""
    identity = plan.identity
    rows = sum(shard.rows for shard in plan.todo)
    steps = identity.solver_steps if identity.source == "trajectory" else identity.solver_steps // identity.knots
    guided = sum(shard.rows * (1 if shard.guidance == 0 else 2) for shard in plan.todo)
    calls = evaluations(steps, identity.solver) * guided
    schema = identity.arrow_schema()
    state = math.prod(identity.sample_shape) * np.dtype(identity.dtype).itemsize
    scalars = sum(int(schema.field(name).type.bit_width) // 8 for name in identity.scalar_columns)
    row_bytes = len(identity.knot_columns) * state + scalars
    cost = network_cost(teacher.network, teacher.sample_shape, teacher.num_classes)
    return (
        f"{rows:,} trajectories, {calls:,} network calls (two per guided evaluation), "
        f"{short(rows * row_bytes, 'B')} before compression in {len(plan.todo):,} shards "
        f"({len(plan.finished):,} already exist); {short(cost.parameters)} parameters, "
        f"{short(cost.flops_per_call, 'FLOP')} per call, {short(calls * cost.flops_per_call, 'FLOP')} in total"
    )
