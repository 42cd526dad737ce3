"""Peak memory of a rollout actor and of the driver, against the number of trajectories and the size of a shard."""

import sys
from pathlib import Path
from typing import Any

from kac import files
from pipeline.benchmark.measurement import Bar, Measurement, interleave
from pipeline.benchmark.setting import Setting, compute_unsealed
from pipeline.benchmark.spec import CALLS_A_SHARD
from pipeline.benchmark.watch import Peaks, watched

UNIT = "MiB"
GROWTH_BAR = 1.1
MAX_TURNS = 2
"""Memory repeats itself where time does not, and a turn needs three rollouts with new actors."""

TRAJECTORIES_FACTOR, SHARD_FACTOR = 10, 4


def measure(setting: Setting) -> list[Measurement]:
    """A rollout of ten times the trajectories, and one with shards of four times the rows, against a plain one."""
    if not Path("/proc/self/status").exists():
        print("benchmark: peak-memory is not measured: it needs the /proc of Linux", file=sys.stderr, flush=True)
        return []
    rows, size = setting.spec.trajectories, CALLS_A_SHARD * setting.spec.batch_size

    def peaks(**options: Any) -> Peaks:
        # One solver step a knot: the memory is that of the full number, in a fifth of the time.
        spec = setting.rollout_spec("memory", actors=1, solver_steps=20, **options)
        with watched() as peaks:
            compute_unsealed(spec)
        files.remove_tree(spec.store)
        return peaks

    plain, longer, larger = interleave(
        min(setting.spec.repeats, MAX_TURNS),
        peaks,
        lambda: peaks(trajectories=TRAJECTORIES_FACTOR * rows),
        lambda: peaks(trajectories=SHARD_FACTOR * rows, shard_size=SHARD_FACTOR * size),
    )
    bar = Bar("<=", GROWTH_BAR)
    ten, four = f"{TRAJECTORIES_FACTOR} x the trajectories / once", f"shards of {SHARD_FACTOR} x the rows / once"
    actor, driver = tuple(p.actor for p in plain), tuple(p.driver for p in plain)
    return [
        Measurement(f"peak of an actor, {ten}", UNIT, tuple(p.actor for p in longer), actor, bar),
        Measurement(f"peak of the driver, {ten}", UNIT, tuple(p.driver for p in longer), driver, bar),
        Measurement(f"peak of an actor, {four}", UNIT, tuple(p.actor for p in larger), actor),
    ]
