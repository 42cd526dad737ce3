"""Rollout: follow the frozen teacher on Ray Data actors and publish its trajectories, shard by shard.

Plan the shards, drop the finished ones, roll the others out on an actor pool, collect the receipts, seal the store.

What makes it exactly-once. The shard is the unit of work and its name is fixed by the plan. The actor that computes a
shard also publishes it, whole or not at all, and only then returns its receipt; a shard that is found published is
checked from end to end and adopted. The manifest, written last, lists receipts alone.

What Ray does by default, and what is done about it (Ray 2.60):
- Actors of a pool restart and retry for ever (max_restarts = max_task_retries = -1; passing others through map_batches
  is deprecated). That is right for a lost node and wrong for a shard that kills its process: the ``Ledger`` counts
  attempts outside the processes that die, and ends the job with the shard's name.
- ``max_errored_blocks`` would drop blocks in silence: it stays 0.
- ``write_parquet`` names files by a new uuid each run and appends: a second run would double everything. Not used.
- ``CheckpointConfig`` resume adds an actor pool of its own and hangs on two CPUs. Not used: the shards are the record.
- A write stage behind a pool that takes every CPU starves; actors that publish by themselves need none. They take two
  shards at a time, so that the upload of one runs while the other is computed.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kac import files
from kac.checkpoint import ModelConfig, load_config, load_model
from kac.data import load_dataset
from kac.errors import DistillKacError
from pipeline import cluster, tracking
from pipeline.config import RolloutSpec
from pipeline.pacing import pause_between_rounds
from pipeline.roller import Roller, RolloutError, Rows, check_finite
from pipeline.store.layout import Shard, StoreError, StoreIdentity, describe_difference, guidance_folder
from pipeline.store.manifest import (
    Contents,
    Manifest,
    list_shards,
    merge_ranges,
    read_manifest,
    shards_of,
    write_manifest,
)
from pipeline.store.shards import (
    DamagedShard,
    Receipt,
    adopt,
    encode,
    identity_of_shard,
    make_table,
    publish,
)
from pipeline.teach import data_fingerprint

MAX_ATTEMPTS = 10
"""How often a shard may take its process down with it, and actors in a row may die without finishing any."""

SHARDS_IN_FLIGHT = 2
SEAL_ATTEMPTS = 3
MAX_BLOCKS = 1000
PAUSE_SECONDS = 0.1


class Plan(NamedTuple):
    """What there is to do."""

    identity: StoreIdentity
    contents: tuple[Contents, ...]  # what the store will hold
    finished: tuple[Receipt, ...]
    todo: tuple[Shard, ...]
    manifest: Manifest | None

    @property
    def rows_finished(self) -> int:
        """Rows that need not be looked at again."""
        return sum(receipt.rows for receipt in self.finished)


def rollout(spec: RolloutSpec, parent: tracking.TrackedRun | None = None) -> Manifest:
    """Bring the store of ``spec`` to what it asks for; what is there already is not computed again.

    Raises:
        DistillKacError: the teacher or the store do not fit, nothing can be written, or a shard failed.
    """
    spec = spec.model_copy(update={"store": cluster.absolute(spec.store), "teacher": cluster.absolute(spec.teacher)})
    teacher = load_config(spec.teacher)
    plan = make_plan(spec, identify(spec, teacher))
    if not plan.todo and plan.manifest is not None and plan.contents == plan.manifest.contents:
        remove_orphans(spec.store, plan.manifest.guidance)
        print(f"rollout: {spec.store} is complete with {plan.rows_finished:,} rows: nothing to do", flush=True)
        return plan.manifest
    load_model(spec.teacher)
    files.check_writable(spec.store)
    inputs = {"teacher": teacher.weights_sha256}
    with tracking.start_run(
        "rollout", f"rollout-{teacher.data}", spec, plan.identity.fingerprint(), inputs, spec.store, parent
    ) as run:
        started = time.perf_counter()
        done = roll_out(spec, plan)
        manifest = seal(spec, plan, [outcome.receipt for outcome in done])
        _report(run, spec, plan, done, time.perf_counter() - started)
    return manifest


def identify(spec: RolloutSpec, teacher: ModelConfig) -> StoreIdentity:
    """What the rows of the store are a function of.

    Raises:
        DistillKacError: the model is not a teacher.
    """
    if teacher.kind != "teacher":
        raise DistillKacError(f"{spec.teacher}: expected a teacher, found a student: give the folder of its teacher")
    return StoreIdentity(
        source=spec.source,
        teacher_sha256=teacher.weights_sha256,
        path=teacher.path,
        solver=spec.solver,
        solver_steps=spec.solver_steps,
        knots=spec.knots,
        seed=spec.seed,
        shard_size=spec.shard_size,
        dtype=spec.dtype,
        sample_shape=teacher.sample_shape,
        class_frequencies=teacher.class_frequencies,
        data_sha256=data_fingerprint(load_dataset(teacher.data)) if spec.source == "forward" else None,
    )


def make_plan(spec: RolloutSpec, wanted: StoreIdentity) -> Plan:
    """Hold what is asked for against what is there.

    Raises:
        StoreError: the store belongs to another spec, or was written by a newer version.
    """
    manifest = read_manifest(spec.store)
    found = list_shards(spec.store)
    _refuse_other_spec(spec.store, wanted, manifest, found)
    asked = (spec.first_sample, spec.first_sample + spec.trajectories)
    held = manifest.contents if manifest else ()
    scales = sorted({*spec.guidance, *(part.guidance for part in held)})
    ranges = {part.guidance: list(part.ids) for part in held}
    contents = tuple(
        Contents(guidance=w, ids=merge_ranges([*ranges.get(w, []), *([asked] if w in spec.guidance else [])]))
        for w in scales
    )
    receipts = {receipt.name: receipt for receipt in manifest.shards} if manifest else {}
    finished, todo = [], []
    for shard in shards_of(contents, wanted.shard_size):
        receipt = receipts.get(shard.name)
        if receipt and receipt.rows >= shard.rows and found.get(shard.name) == receipt.bytes:
            finished.append(receipt)
        else:
            todo.append(shard)
    return Plan(wanted, contents, tuple(finished), tuple(todo), manifest)


def _refuse_other_spec(store: str, wanted: StoreIdentity, manifest: Manifest | None, found: dict[str, int]) -> None:
    if manifest is not None:
        here: StoreIdentity | None = manifest.spec
    else:
        here = next(filter(None, (_identity_or_none(store, name) for name in itertools.islice(found, 8))), None)
    if here is not None and here.fingerprint() != wanted.fingerprint():
        raise StoreError(
            f"{store}: expected a new store or one of this spec, found one of another: "
            f"{describe_difference(wanted, here)}: choose another --store, or the options of this one"
        )


def _identity_or_none(store: str, name: str) -> StoreIdentity | None:
    """A damaged shard says nothing of its store; it will be redone."""
    try:
        return identity_of_shard(store, name)
    except DamagedShard:
        return None


class Outcome(NamedTuple):
    """What became of a planned shard."""

    receipt: Receipt
    computed_rows: int
    finished: float  # when it was there, seconds since the epoch


def roll_out(spec: RolloutSpec, plan: Plan) -> list[Outcome]:
    """Compute or adopt every shard that is to be done; returns when all are published.

    Raises:
        RolloutError: a shard failed; the message names it.
    """
    from tqdm import tqdm

    if not plan.todo:
        return []
    resources = cluster.connect()
    on_gpu = bool(resources.gpus) if spec.gpu is None else spec.gpu
    actors = min(spec.actors or resources.gpus or resources.cpus, len(plan.todo))
    ledger = _start_ledger(actors)
    items = [{"guidance": s.guidance, "index": s.index, "start": s.start, "rows": s.rows} for s in plan.todo]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    rolled = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map_batches(
        ShardRoller,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            size=actors,
            max_tasks_in_flight_per_actor=SHARDS_IN_FLIGHT,
            max_concurrent_calls_per_actor=SHARDS_IN_FLIGHT,
            enable_true_multi_threading=True,
        ),
        fn_constructor_kwargs={"spec": spec, "identity": plan.identity, "ledger": ledger},
        num_cpus=0 if on_gpu else 1,
        num_gpus=1 if on_gpu else 0,
    )
    pause_between_rounds(rolled, PAUSE_SECONDS)
    outcomes = rolled.iter_rows()
    total = sum(shard.rows for shard in plan.todo)
    done = []
    try:
        with tqdm(desc="rollout", total=total, unit="trajectory", mininterval=1.0) as bar:
            for row in outcomes:
                done.append(_outcome(row))
                bar.update(done[-1].receipt.rows)
    except ray.exceptions.RayError as error:
        failure = _reason(ledger, error)
    else:
        return done
    # Ray Data frees the actors when nothing refers to the pipeline, and a raised error refers to this frame: whoever
    # kept the error would keep the CPUs, and the next rollout in this process would wait for them for ever.
    del rolled, outcomes
    raise RolloutError(failure)


def _start_ledger(actors: int) -> Any:
    """The ledger, on the driver's node: if that goes, so does the job. Restarted, it has lost its counts, which only
    puts the bound off."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(Ledger).options(**lasting).remote(actors)


def _outcome(row: dict[str, Any]) -> Outcome:
    return Outcome(Receipt.model_validate_json(row["receipt"]), int(row["computed_rows"]), float(row["finished"]))


def _reason(ledger: Any, error: BaseException) -> str:
    """The one line that the failing actor left in the ledger, or Ray's own."""
    try:
        noted: str | None = ray.get(ledger.failure.remote(), timeout=10)
    except ray.exceptions.RayError:
        noted = None
    return noted or f"the rollout failed in Ray: {' '.join(str(error).split())[-300:]}"


class Ledger:
    """Counts attempts where a dying actor cannot take the count along; keeps the first failure's message."""

    def __init__(self, actors: int) -> None:
        self.actors = actors
        self.begun: set[str] = set()
        self.attempts: dict[str, int] = {}
        self.starts_since_progress = 0
        self.first_failure: str | None = None

    def started(self) -> str | None:
        """An actor started. Returns why it must not, if too many died in a row."""
        self.starts_since_progress += 1
        if self.starts_since_progress > self.actors + MAX_ATTEMPTS * max(1, self.actors):
            tried = ", ".join(sorted(self.begun)) or "any shard was begun"
            return self.fail(
                f"{self.starts_since_progress} actors died in a row without finishing a shard (last tried: {tried}): "
                "see the logs of the workers, often memory"
            )
        return None

    def begin(self, shard: str) -> bool:
        """An actor takes a shard. Returns whether it is suspect: it was in a process that died."""
        is_suspect = shard in self.begun
        self.begun.add(shard)
        return is_suspect

    def begin_alone(self, shard: str) -> str | None:
        """A suspect is begun while no other suspect is. Returns why it must not, if it took too many processes down."""
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
        if self.attempts[shard] > MAX_ATTEMPTS:
            return self.fail(
                f"{shard}: its process died {MAX_ATTEMPTS} times: see the logs of the workers, often memory"
            )
        return None

    def finish(self, shard: str) -> None:
        """A shard is published."""
        self.begun.discard(shard)
        self.attempts.pop(shard, None)
        self.starts_since_progress = 0

    def fail(self, message: str) -> str:
        """Note why the rollout cannot go on; the first reason is kept."""
        self.first_failure = self.first_failure or message
        return message

    def failure(self) -> str | None:
        """The first reason."""
        return self.first_failure


class ShardRoller:
    """An actor: loads the frozen teacher once, then computes and publishes shards.

    Two calls may run at once: one computes, under the lock, while the other reads or publishes.
    """

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity, ledger: Any) -> None:
        refusal = ray.get(ledger.started.remote())
        if refusal:
            raise RolloutError(refusal)
        self.spec, self.identity, self.ledger = spec, identity, ledger
        self.roller = Roller(spec, identity)
        self.computing, self.alone = threading.Lock(), threading.Lock()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """One planned shard in, its receipt out."""
        shard = Shard(*(batch[key][0].item() for key in ("guidance", "index", "start", "rows")))
        is_suspect = ray.get(self.ledger.begin.remote(shard.name))
        # Of two shards that were in a process when it died, only one killed it: now they go one after the other.
        with self.alone if is_suspect else contextlib.nullcontext():
            refusal = ray.get(self.ledger.begin_alone.remote(shard.name)) if is_suspect else None
            if refusal:
                raise RolloutError(refusal)
            try:
                outcome = self._publish(shard)
            except Exception as error:
                ray.get(self.ledger.fail.remote(_failure(self.spec.store, shard, error)))
                raise
            ray.get(self.ledger.finish.remote(shard.name))
        return {
            "receipt": [outcome.receipt.model_dump_json()],
            "computed_rows": [outcome.computed_rows],
            "finished": [outcome.finished],
        }

    def _publish(self, shard: Shard) -> Outcome:
        """Adopt the shard if it is there and whole; else compute what is missing of it and publish it."""
        there, is_damaged = None, False
        try:
            receipt, there = adopt(self.spec.store, shard, self.identity)
            if receipt.rows >= shard.rows:
                return Outcome(receipt, 0, time.time())
        except FileNotFoundError:
            pass  # the usual case: the shard has yet to be made
        except DamagedShard as damage:
            print(f"rollout: {damage}: redoing it", flush=True)
            is_damaged = True
        # Encoded under the lock as well: two threads that both need Python's own lock only get in each other's way.
        with self.computing:
            missing = shard.ids if there is None else range(shard.start + there.num_rows, shard.ids.stop)
            rows = self.roller.roll(shard.guidance, missing)
            if there is not None:
                rows = Rows.joined([Rows.of_table(there, self.identity), rows])
            check_finite(self.spec.store, shard, rows)
            table = make_table(self.identity, shard, rows.label, rows.kinetic_energy, rows.knots, rows.interval)
            data = encode(table, self.spec.compression)
        receipt = publish(self.spec.store, shard, self.identity, data, replace=is_damaged or there is not None)
        return Outcome(receipt, len(missing), time.time())


def _failure(store: str, shard: Shard, error: Exception) -> str:
    if isinstance(error, DistillKacError):
        return str(error)
    return f"{store}/{shard.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def seal(spec: RolloutSpec, plan: Plan, receipts: Sequence[Receipt]) -> Manifest:
    """Write the manifest, once every planned shard has its receipt; then remove what dead writers left.

    Another job may seal other scales of the same store meanwhile: the manifest is united with the one that is there,
    and read back.

    Raises:
        RolloutError: a planned shard has no receipt.
    """
    done = (*plan.finished, *receipts)
    missing = {shard.name for shard in shards_of(plan.contents, plan.identity.shard_size)} - {r.name for r in done}
    if missing:
        raise RolloutError(
            f"{spec.store}: expected a receipt of every shard, found none of {min(missing)}: run it again"
        )
    manifest = _unite(spec, plan, done)
    for _ in range(SEAL_ATTEMPTS):
        write_manifest(spec.store, manifest)
        united = _unite(spec, plan, done)
        if united == manifest:
            break
        manifest = united
    remove_orphans(spec.store, manifest.guidance)
    return manifest


def _unite(spec: RolloutSpec, plan: Plan, done: Sequence[Receipt]) -> Manifest:
    """The manifest of what this job did and what the store's manifest says by now."""
    now = read_manifest(spec.store)
    _refuse_other_spec(spec.store, plan.identity, now, {})
    longest: dict[str, Receipt] = {}
    for receipt in (*(now.shards if now else ()), *done):
        if receipt.name not in longest or receipt.rows >= longest[receipt.name].rows:
            longest[receipt.name] = receipt
    ids: dict[float, list[tuple[int, int]]] = {}
    for part in (*(now.contents if now else ()), *plan.contents):
        ids.setdefault(part.guidance, []).extend(part.ids)
    contents = tuple(Contents(guidance=w, ids=merge_ranges(ids[w])) for w in sorted(ids))
    return Manifest(
        fingerprint=plan.identity.fingerprint(),
        spec=plan.identity,
        teacher=spec.teacher,
        contents=contents,
        shards=tuple(longest[shard.name] for shard in shards_of(contents, plan.identity.shard_size)),
    )


def remove_orphans(store: str, scales: Sequence[float]) -> None:
    """Remove the temporary files that writers on this machine left when they died."""
    for folder in (store, *(files.join(store, guidance_folder(w)) for w in scales)):
        files.remove_orphans(folder)


def _report(run: tracking.TrackedRun, spec: RolloutSpec, plan: Plan, done: Sequence[Outcome], seconds: float) -> None:
    computed = sum(outcome.computed_rows for outcome in done)
    reused = plan.rows_finished + sum(outcome.receipt.rows - outcome.computed_rows for outcome in done)
    size = sum(receipt.bytes for receipt in (*plan.finished, *(outcome.receipt for outcome in done)))
    run.metrics(
        {
            "trajectories": computed + reused,
            "trajectories_reused": reused,
            "trajectories_per_second": computed / seconds,
            "store_bytes": size,
        }
    )
    run.tags({"distillkac.path": spec.store})
    shards_computed = sum(1 for outcome in done if outcome.computed_rows)
    print(
        f"rollout: wrote {spec.store}: {computed:,} trajectories computed in {shards_computed} shards, "
        f"{reused:,} reused in {len(plan.finished) + len(done) - shards_computed} shards, "
        f"{size / 2**20:.1f} MiB, {seconds:.0f} s",
        flush=True,
    )
