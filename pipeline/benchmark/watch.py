"""The peak memory of the processes of a rollout, on all nodes."""

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

from pipeline.rollout.actors import ShardActor

POLL_SECONDS = 0.2
PEAK, NOW = "VmHWM", "VmRSS"


@dataclass
class Peaks:
    """Peak resident memory during a rollout, MiB."""

    actor: float = 0.0  # of the largest
    driver: float = 0.0


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
    workers = [actor for actor in alive if ShardActor.__name__ in actor.class_name and actor.pid]
    found = [
        watcher.largest.remote([actor.pid for actor in workers if actor.node_id == node])
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
