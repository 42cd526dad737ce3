"""Shards per second that the driver of a rollout can schedule, when shards need no work.

The driver normally pauses between two rounds of scheduling. A few actors without work would wait for these pauses; a
thousand would not. So the benchmark removes the pauses and measures only the driver's work per shard.
"""

import time
from typing import NamedTuple

from pipeline.benchmark.fake_shards import FakeShardMaker
from pipeline.benchmark.measurement import Bar, Measurement, interleave
from pipeline.benchmark.setting import Setting
from pipeline.benchmark.store_scale import TENTH, store_spec
from pipeline.cluster import connection as cluster
from pipeline.memory import peak_memory
from pipeline.rollout import make_plan
from pipeline.rollout.actors import compute_on_actors

ACTORS_PER_CPU = 1
SLOWDOWN_BAR = Bar(">=", 0.7)


class Scheduled(NamedTuple):
    """The cost of scheduling fake shards."""

    rate: float  # shards per second
    driver_milliseconds: float  # CPU time per shard
    growth: float  # of the driver's peak memory, in MiB


def measure(setting: Setting) -> list[Measurement]:
    """Measure ``setting.spec.shards`` shards and a tenth of that number, with one actor per CPU."""
    many, few = interleave(
        min(setting.spec.repeats, 2),
        lambda: schedule(setting, setting.spec.shards),
        lambda: schedule(setting, max(1, setting.spec.shards // TENTH)),
    )
    counts = f"{setting.spec.shards:,} shards / a tenth"
    rate, milliseconds, growth = zip(*many, strict=True)
    rate_of_few, milliseconds_of_few, _ = zip(*few, strict=True)
    return [
        Measurement(f"shards without work, {counts}", "shards/s", rate, rate_of_few, SLOWDOWN_BAR),
        Measurement(f"the driver's CPU, {counts}", "ms/shard", milliseconds, milliseconds_of_few),
        Measurement(f"growth of the driver, {setting.spec.shards:,} shards", "MiB", growth),
    ]


def schedule(setting: Setting, count: int) -> Scheduled:
    """Schedule ``count`` fake shards on the actors of a rollout.

    The clock starts when the first shard is done, so that the rate excludes the start of the actors.
    """
    spec = store_spec(setting, count).model_copy(update={"actors": ACTORS_PER_CPU * cluster.connect().cpus})
    plan = make_plan(spec)
    before, cpu = peak_memory() or 0, time.process_time()
    outcomes = compute_on_actors(spec, plan, FakeShardMaker, pause_seconds=0.0)
    done = [next(outcomes)]
    started = time.perf_counter()
    done.extend(outcomes)
    seconds = time.perf_counter() - started
    milliseconds = 1000 * (time.process_time() - cpu) / len(done)
    return Scheduled((len(done) - 1) / max(seconds, 1e-9), milliseconds, ((peak_memory() or 0) - before) / 1024)
