"""How many shards a second the rollout's own machinery takes, when no shard needs any work.

The driver sends out what its actors have room for, rests, and looks again: few actors without work would wait for its
rests, a thousand would not. Here it has none, and what is measured is what the driver has to do for a shard.
"""

import time
from typing import NamedTuple

from pipeline.benchmark.made_up import NoWork
from pipeline.benchmark.measurement import Bar, Measurement, interleave
from pipeline.benchmark.setting import Setting
from pipeline.benchmark.store_scale import TENTH, store_spec
from pipeline.cluster import connection as cluster
from pipeline.memory import peak_memory
from pipeline.rollout import make_plan
from pipeline.rollout.actors import compute_on_actors

ACTORS_A_CPU = 1
SLOWDOWN_BAR = Bar(">=", 0.7)


class Scheduled(NamedTuple):
    """A rollout of shards without work."""

    rate: float  # shards a second
    driver_milliseconds: float  # of CPU, a shard
    growth: float  # of the driver's peak memory, MiB


def measure(setting: Setting) -> list[Measurement]:
    """On as many actors as there are CPUs, ``setting.spec.shards`` shards and a tenth as many."""
    many, few = interleave(
        min(setting.spec.repeats, 2),
        lambda: schedule(setting, setting.spec.shards),
        lambda: schedule(setting, max(1, setting.spec.shards // TENTH)),
    )
    of = f"{setting.spec.shards:,} shards / a tenth"
    rate, milliseconds, growth = zip(*many, strict=True)
    rate_of_few, milliseconds_of_few, _ = zip(*few, strict=True)
    return [
        Measurement(f"shards without work, {of}", "shards/s", rate, rate_of_few, SLOWDOWN_BAR),
        Measurement(f"the driver's CPU, {of}", "ms/shard", milliseconds, milliseconds_of_few),
        Measurement(f"growth of the driver, {setting.spec.shards:,} shards", "MiB", growth),
    ]


def schedule(setting: Setting, count: int) -> Scheduled:
    """Send so many shards without work through the rollout's actors.

    The clock starts with the first shard that is done: the start of the actors is not part of the rate.
    """
    spec = store_spec(setting, count).model_copy(update={"actors": ACTORS_A_CPU * cluster.connect().cpus})
    plan = make_plan(spec)
    before, cpu = peak_memory() or 0, time.process_time()
    outcomes = compute_on_actors(spec, plan, NoWork, pause_seconds=0.0)
    kept = [next(outcomes)]
    started = time.perf_counter()
    kept.extend(outcomes)
    seconds = time.perf_counter() - started
    milliseconds = 1000 * (time.process_time() - cpu) / len(kept)
    return Scheduled((len(kept) - 1) / max(seconds, 1e-9), milliseconds, ((peak_memory() or 0) - before) / 1024)
