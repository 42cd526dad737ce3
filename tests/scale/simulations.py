"""Rollouts of very many shards that are not computed, and the speed of the Kac process.

Each simulation takes a scratch folder and a number of shards, and returns its costs by name. Compare the costs with
those for a tenth of the shards, to see which costs grow faster than the number of shards.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch
from torch.utils.benchmark import Timer

from kac.process import KacProcess
from kac.util import files
from pipeline.cluster import connection as cluster
from pipeline.config import RolloutSpec
from pipeline.memory import peak_memory
from pipeline.rollout import ShardOutcome, actors, make_plan, seal
from pipeline.store.layout import MANIFEST, Shard, StoreIdentity
from pipeline.store.manifest import list_shards, read_manifest
from pipeline.store.order import Order, windows
from pipeline.store.reader import open_store
from pipeline.store.shards import Receipt
from tests.pipeline.stores import make_spec, make_teacher

SHARD_ROWS, WINDOW_SHARDS = 1024, 64
LEDGER_CALLS = 1000  # calls in flight, as from a thousand actors
ELEMENTS = 1_000_000

Costs = dict[str, float]


def store_scale(folder: str, shards: int) -> Costs:
    """Measure the CPU seconds to list, plan, seal and open a store of one-byte shards, excluding any wait for S3."""
    spec = _spec(folder, shards, actors=0)
    for shard in make_plan(spec).todo:
        path = Path(spec.store, shard.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0")
    costs: Costs = {}
    before = _peak_mib()

    def timed(what: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        value = work()
        costs[f"{what}, CPU s"] = time.process_time() - started
        return value

    timed("list", lambda: list_shards(spec.store))
    plan = timed("plan, no manifest", lambda: make_plan(spec))
    outcomes = [outcome_of(shard) for shard in plan.todo]
    timed("seal", lambda: seal(spec, plan, outcomes))
    costs["growth of the driver, MiB"] = _peak_mib() - before
    costs["manifest, bytes"] = len(files.read_bytes(files.join(spec.store, MANIFEST)))
    timed("read the manifest", lambda: read_manifest(spec.store))
    timed("plan, finished", lambda: make_plan(spec))
    store = timed("open", lambda: open_store(spec.store))
    order = Order(rank=0, world_size=1, seed=0)
    timed("order of an epoch", lambda: windows(store.shards, order, 0, WINDOW_SHARDS * SHARD_ROWS))
    return costs


def scheduling_rate(folder: str, shards: int) -> Costs:
    """Measure the rate at which the driver of a rollout schedules shards that take no work, on one actor per CPU.

    A few actors would sit idle during the driver's pauses between scheduling rounds; a thousand would not. Therefore
    the simulation has no pauses. The clock starts at the first finished shard, when the actors have started.
    """
    spec = _spec(folder, shards, actors=cluster.connect().cpus)
    plan = make_plan(spec)
    before, cpu = _peak_mib(), time.process_time()
    with mock.patch.object(actors, "PAUSE_SECONDS", 0.0):
        outcomes = actors.compute_on_actors(spec, plan, FakeShardMaker)
        next(outcomes)
    started = time.perf_counter()
    rest = len(list(outcomes))
    seconds = time.perf_counter() - started
    return {
        "shards/s": rest / seconds,
        "the driver's CPU, ms/shard": 1000 * (time.process_time() - cpu) / shards,
        "growth of the driver, MiB": _peak_mib() - before,
    }


def ledger_rate(folder: str, shards: int) -> Costs:
    """Measure the rate of calls that a rollout's ledger serves to one process per CPU. A shard takes two calls."""
    callers = max(1, cluster.connect().cpus)
    ledger = ray.remote(actors.AttemptLedger).options(num_cpus=0).remote(LEDGER_CALLS)
    task = ray.remote(_call).options(num_cpus=0)
    names = [Shard(0.0, index, 0, 0).name for index in range(shards)]
    ray.get([task.remote(ledger, names[:1], 1) for _ in range(callers)])  # starts the processes
    started = time.perf_counter()
    ray.get([task.remote(ledger, names[i::callers], LEDGER_CALLS // callers) for i in range(callers)])
    seconds = time.perf_counter() - started
    ray.kill(ledger)
    return {"calls/s": 2 * shards / seconds}


def process_speed(folder: str, shards: int) -> Costs:
    """Measure the time per element, on one thread, of a normal draw, a draw of the Kac process, and its velocity."""
    process, generator = KacProcess(a=9.0, c=3.0), torch.Generator().manual_seed(0)
    t = torch.rand(ELEMENTS, generator=generator).clamp(min=1e-6)
    noise = process.sample(t, generator)
    work = {
        "normal draw": lambda: torch.randn(ELEMENTS, generator=generator),
        "exact draw of the process": lambda: process.sample(t, generator),
        "velocity of the process": lambda: process.velocity(noise.displacement, t, noise.is_atom),
    }
    timers = {what: Timer("work()", globals={"work": each}) for what, each in work.items()}
    return {f"{what}, ns": timer.blocked_autorange().median / ELEMENTS * 1e9 for what, timer in timers.items()}


SIMULATIONS: dict[str, Callable[[str, int], Costs]] = {
    "store-scale": store_scale,
    "scheduling-rate": scheduling_rate,
    "ledger-rate": ledger_rate,
    "process-speed": process_speed,
}


class FakeShardMaker:
    """Replaces a ``ShardMaker``. Reports a shard as done without computing it."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None: ...

    def make(self, shard: Shard) -> ShardOutcome:
        """Return the outcome of a fake shard."""
        return outcome_of(shard)


def outcome_of(shard: Shard) -> ShardOutcome:
    """Return the outcome of a fake shard."""
    # A digest of the name makes the receipt as long and as incompressible as a real receipt.
    digest = hashlib.sha256(shard.name.encode()).hexdigest()
    facts = {"name": shard.name, "guidance": shard.guidance, "start": shard.start, "rows": shard.rows}
    receipt = Receipt(**facts, bytes=1, sha256=digest)
    return ShardOutcome(receipt=receipt, computed_rows=shard.rows, compute_seconds=0.1, finished=0.0, peak_memory=None)


def _spec(folder: str, shards: int, actors: int) -> RolloutSpec:
    teacher = make_teacher(files.join(folder, "teacher"))
    size = {"trajectories": shards * SHARD_ROWS, "shard_size": SHARD_ROWS}
    return make_spec(files.join(folder, "store"), teacher, actors=actors, **size)


def _peak_mib() -> float:
    return (peak_memory() or 0) / 1024


def _call(ledger: Any, names: Sequence[str], concurrency: int) -> None:
    """Begin and finish some shards, in waves of ``concurrency`` shards."""
    for first in range(0, len(names), concurrency):
        wave = names[first : first + concurrency]
        for method in (ledger.begin, ledger.finish):
            ray.get([method.remote(name) for name in wave])
