"""The stage: plan the shards, drop the finished ones, compute the others, seal the store, report."""

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
from pipeline.cluster.actor_place import choose_place
from pipeline.cluster.placement import await_room
from pipeline.config.specs import RolloutSpec
from pipeline.progress import ProgressBar
from pipeline.rollout.cost import describe_cost, describe_remaining
from pipeline.rollout.plan import Plan, make_plan
from pipeline.rollout.seal import remove_orphans, seal
from pipeline.rollout.shards import Outcome, ShardMaker
from pipeline.rollout.teacher import endpoint_rms
from pipeline.store.manifest import Manifest
from pipeline.store.receipts import SHARDS_A_NOTE, write_note

tracking.declare(
    Metric("trajectories", "trajectories in the store"),
    Metric("trajectories_reused", "trajectories that an earlier run had finished"),
    Metric("trajectories_per_second", "rollout speed, its start included", better="higher"),
    Metric("store_bytes", "bytes of all shards", better="lower"),
)


def rollout(spec: RolloutSpec, parent: tracking.TrackedRun | None = None) -> Manifest | None:
    """Bring the store of ``spec`` to what it asks for; what is there already is not computed again.

    Returns:
        The manifest of the store; None after a dry run.

    Raises:
        DistillKacError: the teacher or the store do not fit, nothing can be written, or a shard failed.
    """
    spec = spec.model_copy(update={"store": cluster.absolute(spec.store), "teacher": cluster.absolute(spec.teacher)})
    is_spread = spec.actors != 0
    storage.check_shared({"`store`": spec.store, "`teacher`": spec.teacher}, lambda: is_spread)
    if spec.source == "forward":
        root = load_teacher_config(spec.teacher).data.root
        storage.check_shared({"`data.root` of the teacher": root, **storage.cache_of(bool(root))}, lambda: is_spread)
    check_apart(spec, {"`data.root` of the teacher": load_teacher_config(spec.teacher).data.root})
    spec = spec.settled(lambda: choose_place(spec).on_gpu)
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
    place = choose_place(spec)
    if place.actors:
        await_room("rollout", "`actors`", place.for_work(len(plan.todo)).actors, place.share)
    probes.check_writable(spec.store)
    log.info(f"{cost}\nrollout: {place}, {spec.precision.on(place.on_gpu)}")
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
        moved = compare_with_float32(spec, plan)
        outcomes = compute_shards(spec, plan)
        manifest = seal(spec, plan, outcomes, moved)
        told = _log(run, spec, plan, outcomes, time.perf_counter() - started)
    log.info(told)  # below what MLflow prints at the end of a run
    return manifest


def compare_with_float32(spec: RolloutSpec, plan: Plan) -> float | None:
    """``endpoint_rms`` of a rollout in another precision than float32, unless its store says it already.

    Raises:
        RolloutError: it cannot be computed.
    """
    if spec.precision.dtype == "float32" or not plan.todo or (plan.manifest and plan.manifest.endpoint_rms is not None):
        return None
    if spec.actors == 0:
        moved = endpoint_rms(spec, plan.identity)
    else:
        from pipeline.rollout.actors import endpoint_rms_on_ray

        moved = endpoint_rms_on_ray(spec, plan)
    log.info(f"rollout: {spec.precision.dtype} moves endpoints by {moved:.2g} from float32's (root mean square)")
    return moved


def compute_shards(spec: RolloutSpec, plan: Plan) -> list[Outcome]:
    """Compute or adopt every shard that is to be done; returns when all are published.

    Raises:
        RolloutError: a shard failed; the message names it.
    """
    if not plan.todo:
        return []
    outcomes: list[Outcome] = []
    total, has_computed = sum(shard.rows for shard in plan.todo), False
    with ProgressBar("rollout", total, "trajectories") as bar, contextlib.closing(_compute(spec, plan)) as made:
        for outcome in made:
            is_first = outcome.computed_rows > 0 and not has_computed
            has_computed |= is_first
            outcomes.append(outcome)
            bar.update(outcome.receipt.rows)
            if is_first and bar.done < total:
                bar.say(f"rollout: {describe_remaining(outcome, total - bar.done, most(choose_place(spec).actors))}")
            if len(outcomes) % SHARDS_A_NOTE == 0:
                write_note(spec.store, plan.identity, [known.receipt for known in outcomes[-SHARDS_A_NOTE:]])
    return outcomes


def _compute(spec: RolloutSpec, plan: Plan) -> Generator[Outcome]:
    if spec.actors == 0:
        yield from map(ShardMaker(spec, plan.identity).make, plan.todo)
    else:
        from pipeline.rollout.actors import compute_on_actors

        yield from compute_on_actors(spec, plan)


def _log(run: tracking.TrackedRun, spec: RolloutSpec, plan: Plan, outcomes: Sequence[Outcome], seconds: float) -> str:
    """Log what was made; returns the line that says so."""
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
