"""Calls per second that the ledger of a rollout can serve. Every shard needs two calls."""

import time
from collections.abc import Sequence
from typing import Any

import ray

from pipeline.benchmark.measurement import Measurement
from pipeline.benchmark.setting import Setting
from pipeline.cluster import connection as cluster
from pipeline.rollout.actors import AttemptLedger

ACTORS = 1000
"""Simulated by this number of concurrent calls."""


def measure(setting: Setting) -> list[Measurement]:
    """Measure ``setting.spec.shards`` shards, with one calling process per CPU."""
    rates = tuple(calls_per_second(setting.spec.shards, ACTORS) for _ in range(setting.spec.repeats))
    return [Measurement(f"the ledger, {ACTORS:,} calls at once", "calls/s", rates)]


def calls_per_second(shards: int, concurrency: int) -> float:
    """The rate at which a ledger begins and finishes shards, with ``concurrency`` calls in flight."""
    callers = max(1, cluster.connect().cpus)
    ledger = ray.remote(AttemptLedger).options(num_cpus=0).remote(concurrency)
    task = ray.remote(call).options(num_cpus=0)
    names = [f"data/guidance=0.0/shard-{index:06d}.parquet" for index in range(shards)]
    calls_per_process = max(1, concurrency // callers)
    ray.get([task.remote(ledger, names[:1], calls_per_process) for _ in range(callers)])  # starts the processes
    started = time.perf_counter()
    ray.get([task.remote(ledger, names[caller::callers], calls_per_process) for caller in range(callers)])
    seconds = time.perf_counter() - started
    ray.kill(ledger)
    return 2 * shards / seconds


def call(ledger: Any, names: Sequence[str], concurrency: int) -> None:
    """Begin and finish some shards, in waves of ``concurrency`` shards."""
    for first in range(0, len(names), concurrency):
        wave = names[first : first + concurrency]
        for method in (ledger.begin, ledger.finish):
            ray.get([method.remote(name) for name in wave])
