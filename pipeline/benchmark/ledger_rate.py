"""How many calls a second the ledger of a rollout takes; every shard costs it two."""

import time
from collections.abc import Sequence
from typing import Any

import ray

from pipeline.benchmark.measurement import Measurement
from pipeline.benchmark.setting import Setting
from pipeline.cluster import connection as cluster
from pipeline.rollout.actors import Ledger

ACTORS = 1000
"""Which are simulated by as many calls under way at once."""


def measure(setting: Setting) -> list[Measurement]:
    """Calls from as many processes as there are CPUs, for ``setting.spec.shards`` shards."""
    rates = tuple(calls_a_second(setting.spec.shards, ACTORS) for _ in range(setting.spec.repeats))
    return [Measurement(f"the ledger, {ACTORS:,} calls at once", "calls/s", rates)]


def calls_a_second(shards: int, at_once: int) -> float:
    """The rate at which a ledger begins and finishes shards, with so many calls under way at once."""
    callers = max(1, cluster.connect().cpus)
    ledger = ray.remote(Ledger).options(num_cpus=0).remote(at_once)
    task = ray.remote(call).options(num_cpus=0)
    names = [f"data/guidance=0.0/shard-{index:06d}.parquet" for index in range(shards)]
    share = max(1, at_once // callers)
    ray.get([task.remote(ledger, names[:1], share) for _ in range(callers)])  # the processes start
    started = time.perf_counter()
    ray.get([task.remote(ledger, names[caller::callers], share) for caller in range(callers)])
    seconds = time.perf_counter() - started
    ray.kill(ledger)
    return 2 * shards / seconds


def call(ledger: Any, names: Sequence[str], at_once: int) -> None:
    """Begin and finish some shards, in waves of so many."""
    for first in range(0, len(names), at_once):
        wave = names[first : first + at_once]
        for method in (ledger.begin, ledger.finish):
            ray.get([method.remote(name) for name in wave])
