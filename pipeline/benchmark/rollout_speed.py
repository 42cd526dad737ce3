"""Rollout speed in steady state: an actor against a bare loop, and more actors against one."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from kac import files
from kac.errors import DistillKacError
from pipeline import cluster
from pipeline.benchmark.measurement import Bar, Measurement, interleave
from pipeline.benchmark.setting import Setting, compute_unsealed
from pipeline.rollout.actors import SHARDS_IN_FLIGHT

UNIT = "trajectories/s"
ACTOR_BAR = 0.95
SCALING_BAR = 0.9
"""Of the ideal: two actors must be 1.8 times as fast as one."""


def measure(setting: Setting) -> list[Measurement]:
    """One actor against the bare loop; two, and as many as the cluster has room for, against one.

    Without a GPU, also two bare loops at once against one: two cores of a machine share its memory and its clock, and
    no actors can be faster than that.
    """
    resources = cluster.connect()
    room = resources.gpus or resources.cpus
    counts = sorted({n for n in (2, room) if 2 <= n <= room})
    loops = [2] if counts and not resources.gpus else []
    bare, one, *more = interleave(
        setting.spec.repeats,
        lambda: bare_speed(setting),
        lambda: actor_speed(setting, 1),
        *(functools.partial(actor_speed, setting, n) for n in counts),
        *(functools.partial(bare_speed, setting, n) for n in loops),
    )
    return [
        Measurement("one actor / a bare loop of one thread", UNIT, one, bare, Bar(">=", ACTOR_BAR)),
        *(Measurement(f"{n} actors / one actor", UNIT, more.pop(0), one, Bar(">=", SCALING_BAR * n)) for n in counts),
        *(Measurement(f"{n} bare loops at once / one", UNIT, more.pop(0), bare) for n in loops),
    ]


def actor_speed(setting: Setting, actors: int) -> float:
    """Trajectories a second of a rollout on ``actors`` actors, in steady state."""
    spec = setting.rollout_spec(f"actors-{actors}", actors=actors, trajectories=actors * setting.spec.trajectories)
    try:
        finished = [outcome.finished for outcome in compute_unsealed(spec)]
        return steady_rate(finished, actors) * spec.shard_size
    finally:
        files.remove_tree(spec.store)


def steady_rate(finished: Sequence[float], actors: int) -> float:
    """Shards a second between two moments at which every actor is warm and at work.

    The actors are up before the first of them begins, and each takes shard after shard, some at a time. Those first
    ones are slow, so the time begins when as many are finished; and until ``actors`` are left, none is idle. Between
    the two lie whole rounds of all actors, whether they finish together or in turns.

    Args:
        finished: when each shard was published, ascending, seconds.

    Raises:
        ValueError: too few shards an actor for that.
    """
    slow = SHARDS_IN_FLIGHT * actors
    if len(finished) < slow + 2 * actors:
        raise ValueError(f"expected at least {slow + 2 * actors} shards of {actors} actors, got {len(finished)}")
    first, last = slow - 1, len(finished) - 1 - actors
    return (last - first) / (finished[last] - finished[first])


def bare_speed(setting: Setting, loops: int = 1) -> float:
    """Trajectories a second of ``loops`` bare loops at once, each in a fresh process with the one thread of an actor.

    Raises:
        DistillKacError: a process failed.
    """
    spec = setting.rollout_spec("bare").model_dump_json()
    with ThreadPoolExecutor(loops) as pool:
        return sum(pool.map(_bare_lap, [spec] * loops))


def _bare_lap(spec: str) -> float:
    command, environment = [sys.executable, "-m", "pipeline.benchmark.bare"], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=spec, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DistillKacError(f"the bare loop: expected exit code 0, found {done.returncode}: {reason}")
    lap = json.loads(done.stdout)
    return float(lap["rows"] / lap["seconds"])
