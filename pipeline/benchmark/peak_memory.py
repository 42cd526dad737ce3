"""Peak memory of a rollout actor and of the driver, with more trajectories and with larger shards."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from kac.util import files
from kac.util.log import log
from pipeline.benchmark.measurement import Bar, Measurement, interleave
from pipeline.benchmark.setting import Setting, compute_unsealed
from pipeline.benchmark.spec import CALLS_PER_SHARD
from pipeline.memory import peak_memory

UNIT = "MiB"
GROWTH_BAR = Bar("<=", 1.1)
MAX_TURNS = 2
"""Memory varies less than time, and each turn takes three rollouts with new actors."""

TRAJECTORIES_FACTOR, SHARD_FACTOR = 10, 4
RESET_FILE = Path("/proc/self/clear_refs")


class Peaks(NamedTuple):
    """Peak resident memory during a rollout, MiB."""

    actor: float
    driver: float


def measure(setting: Setting) -> list[Measurement]:
    """Compare a plain rollout with ten times the trajectories, and with shards of four times the rows."""
    if not os.access(RESET_FILE, os.W_OK):
        log.warning(f"benchmark: skipping peak-memory, because this machine has no writable {RESET_FILE}.")
        return []
    rows, size = setting.spec.trajectories, CALLS_PER_SHARD * setting.spec.batch_size
    plain, longer, larger = interleave(
        min(setting.spec.repeats, MAX_TURNS),
        lambda: rollout_peaks(setting),
        lambda: rollout_peaks(setting, trajectories=TRAJECTORIES_FACTOR * rows),
        lambda: rollout_peaks(setting, trajectories=SHARD_FACTOR * rows, shard_size=SHARD_FACTOR * size),
    )
    ten, four = f"{TRAJECTORIES_FACTOR} x the trajectories / once", f"shards of {SHARD_FACTOR} x the rows / once"
    actor, driver = zip(*plain, strict=True)
    longer_actor, longer_driver = zip(*longer, strict=True)
    return [
        Measurement(f"peak of an actor, {ten}", UNIT, longer_actor, actor, GROWTH_BAR),
        Measurement(f"peak of the driver, {ten}", UNIT, longer_driver, driver, GROWTH_BAR),
        Measurement(f"peak of an actor, {four}", UNIT, tuple(peaks.actor for peaks in larger), actor),
    ]


def rollout_peaks(setting: Setting, **options: Any) -> Peaks:
    """The peak memory of a rollout on one actor."""
    # One solver step per knot needs the same memory as five and a fifth of the time.
    spec = setting.rollout_spec("memory", actors=1, solver_steps=20, **options)
    reset_peak()
    outcomes = compute_unsealed(spec)
    actor, driver = max(outcome.peak_memory or 0 for outcome in outcomes), peak_memory() or 0
    files.remove_tree(spec.store)
    return Peaks(actor / 1024, driver / 1024)


def reset_peak() -> None:
    """Reset the peak memory of this process in the kernel (the 5 is explained in proc_pid_clear_refs(5))."""
    RESET_FILE.write_text("5")
