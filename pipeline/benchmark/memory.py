"""(e) Peak memory of a rollout actor and of the driver, against the number of trajectories and the size of a shard."""

import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors

from kac import files
from pipeline.benchmark.measurement import Bar, Measurement, interleave
from pipeline.benchmark.setting import Setting, run
from pipeline.benchmark.spec import CALLS_A_SHARD
from pipeline.config import RolloutSpec
from pipeline.rollout import ShardRoller

UNIT = "MiB"
GROWTH_BAR = 1.1
MAX_TURNS = 2
"""Memory repeats itself where time does not, and a turn needs three rollouts with new actors."""

TRAJECTORIES_FACTOR, SHARD_FACTOR = 10, 4
POLL_SECONDS = 0.2
PEAK, NOW = "VmHWM", "VmRSS"


@dataclass
class Peaks:
    """Peak resident memory during a rollout, MiB."""

    actor: float = 0.0  # of the largest
    driver: float = 0.0


def peak_memory(setting: Setting) -> list[Measurement]:
    """A rollout of ten times the trajectories, and one with shards of four times the rows, against a plain one."""
    if not Path("/proc/self/status").exists():
        print("benchmark: (e) is not measured: it needs the /proc of Linux", file=sys.stderr, flush=True)
        return []
    rows, size = setting.spec.trajectories, CALLS_A_SHARD * setting.spec.batch_size

    def peaks(**options: Any) -> Peaks:
        # One solver step a knot: the memory is that of the full number, in a fifth of the time.
        return rollout_peaks(setting.rollout_spec("memory", **{"actors": 1, "solver_steps": 20, **options}))

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
        Measurement("e", f"peak of an actor, {ten}", UNIT, tuple(p.actor for p in longer), actor, bar),
        Measurement("e", f"peak of the driver, {ten}", UNIT, tuple(p.driver for p in longer), driver, bar),
        Measurement("e", f"peak of an actor, {four}", UNIT, tuple(p.actor for p in larger), actor),
    ]


def rollout_peaks(spec: RolloutSpec) -> Peaks:
    """The peaks of one rollout, whose store is removed again."""
    with watched() as peaks:
        run(spec)
    files.remove_tree(spec.store)
    return peaks


@contextmanager
def watched() -> Iterator[Peaks]:
    """Watch this driver and its rollout actors, on all nodes, until the block ends.

    An actor's peak is the kernel's own count, so nothing is missed between two looks but what comes after the last one.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    watchers = {
        node: ray.remote(Watcher)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote()
        for node in nodes
    }
    ray.get([watcher.largest.remote([]) for watcher in watchers.values()])
    peaks, is_over = Peaks(), threading.Event()

    def watch() -> None:
        while not is_over.wait(POLL_SECONDS):
            _look(watchers, peaks)

    with ThreadPoolExecutor(max_workers=1) as pool:
        watching = pool.submit(watch)
        try:
            yield peaks
        finally:
            is_over.set()
        watching.result()
    for watcher in watchers.values():
        ray.kill(watcher)


def _look(watchers: dict[str, Any], peaks: Peaks) -> None:
    here = ray.get_runtime_context()
    mine = [("job_id", "=", here.get_job_id()), ("state", "=", "ALIVE")]
    alive = list_actors(address=here.gcs_address, filters=mine, limit=1000)
    rollers = [actor for actor in alive if ShardRoller.__name__ in actor.class_name and actor.pid]
    found = [
        watcher.largest.remote([actor.pid for actor in rollers if actor.node_id == node])
        for node, watcher in watchers.items()
    ]
    peaks.actor = max([peaks.actor, *ray.get(found)])
    peaks.driver = max(peaks.driver, memory_of("self", NOW))


class Watcher:
    """An actor on a node that can see its processes."""

    def largest(self, pids: Iterable[int]) -> float:
        """The largest peak of the processes, MiB; 0 if there are none."""
        return max((memory_of(pid, PEAK) for pid in pids), default=0.0)


def memory_of(pid: int | str, what: str) -> float:
    """A process's resident memory, MiB: its ``PEAK`` so far, or ``NOW``; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    values = [line.split()[1] for line in lines if line.startswith(f"{what}:")]
    return int(values[0]) / 1024 if values else 0.0
