"""The parts that run rollouts: their speed in steady state, and their peak memory."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from kac.model import load_model
from kac.sampling import Sampling, draw
from kac.util import files
from kac.util.device import default_device
from kac.util.log import log
from pipeline.benchmark.measurement import Measurement, interleave
from pipeline.benchmark.setting import CALLS_PER_SHARD, Setting
from pipeline.cluster import connection as cluster
from pipeline.cluster.placement import choose_actors
from pipeline.config import RolloutSpec
from pipeline.memory import peak_memory
from pipeline.rollout import ShardOutcome, compute_shards, make_plan
from pipeline.rollout.actors import SHARDS_IN_FLIGHT

RESET_FILE = Path("/proc/self/clear_refs")


def measure_rollout_speed(setting: Setting) -> list[Measurement]:
    """Compare one actor with a bare loop, and one actor with two and with as many as the cluster can run.

    Without a GPU, also compare two concurrent bare loops with one. Two cores share memory bandwidth and clock speed, so
    this ratio is an upper limit for two actors.
    """
    resources, unit = cluster.connect(), "trajectories/s"
    max_actors = resources.gpus or resources.cpus
    counts = sorted({n for n in (2, max_actors) if 2 <= n <= max_actors})
    loops = [2] if counts and not resources.gpus else []
    bare, one, *more = interleave(
        setting.spec.repeats,
        lambda: bare_speed(setting),
        lambda: actor_speed(setting, 1),
        *(functools.partial(actor_speed, setting, n) for n in counts),
        *(functools.partial(bare_speed, setting, n) for n in loops),
    )
    return [
        Measurement("one actor / a bare loop of one thread", unit, one, bare, ">= 0.95"),
        *(Measurement(f"{n} actors / one actor", unit, more.pop(0), one, f">= {0.9 * n:g}") for n in counts),
        *(Measurement(f"{n} bare loops at once / one", unit, more.pop(0), bare) for n in loops),
    ]


def bare_speed(setting: Setting, loops: int = 1) -> float:
    """Trajectories per second of ``loops`` concurrent bare loops, each in a Ray task with the resources of an actor."""
    spec = setting.rollout_spec("bare", actors=loops)
    task = ray.remote(loop_speed).options(**choose_actors(spec).resources.remote_options)
    return float(sum(ray.get([task.remote(spec) for _ in range(loops)])))


def loop_speed(spec: RolloutSpec) -> float:
    """Trajectories per second of the teacher on the batches of a rollout, without Ray Data or a store."""
    model = load_model(spec.teacher, default_device())
    sampling = Sampling(spec.guidance[0], spec.solver_steps, spec.solver, spec.knot_grid)
    loop = functools.partial(draw, model, sampling, spec.precision, spec.seed, first=spec.first_sample, raw=True)
    loop(spec.batch_size, spec.batch_size)  # warms up
    return spec.trajectories / loop(spec.trajectories, spec.batch_size).seconds


def actor_speed(setting: Setting, actors: int) -> float:
    """Trajectories per second of a rollout on ``actors`` actors, in steady state."""
    spec = setting.rollout_spec(f"actors-{actors}", actors=actors, trajectories=actors * setting.spec.trajectories)
    return steady_rate([outcome.finished for outcome in run_and_remove(spec)], actors) * spec.shard_size


def run_and_remove(spec: RolloutSpec) -> list[ShardOutcome]:
    """Run a rollout, starting when all actors are ready. Return the outcomes in order of completion."""
    context = ray.data.DataContext.get_current().copy()
    context.wait_for_min_actors_s = 600
    with ray.data.DataContext.current(context):
        outcomes = compute_shards(spec, make_plan(spec))
    files.remove_tree(spec.store)
    return sorted(outcomes, key=lambda outcome: outcome.finished)


def steady_rate(finished: Sequence[float], actors: int) -> float:
    """Shards per second while all actors are warm and busy, from the ascending times at which shards were published.

    The clock starts when every actor has finished its first, slow shards. It stops when ``actors`` shards are left,
    because actors may be idle after that. In between, all actors finish the same number of shards.
    """
    first, last = SHARDS_IN_FLIGHT * actors - 1, len(finished) - 1 - actors
    return (last - first) / (finished[last] - finished[first])


def measure_peak_memory(setting: Setting) -> list[Measurement]:
    """Compare a plain rollout with ten times the trajectories, and with shards of four times the rows."""
    if not os.access(RESET_FILE, os.W_OK):
        log.warning(f"benchmark: skipping peak-memory, because this machine has no writable {RESET_FILE}.")
        return []
    rows, size = setting.spec.trajectories, CALLS_PER_SHARD * setting.spec.batch_size
    plain, longer, larger = interleave(
        min(setting.spec.repeats, 2),  # memory varies less than time, and a turn takes three rollouts
        lambda: rollout_peaks(setting),
        lambda: rollout_peaks(setting, trajectories=10 * rows),
        lambda: rollout_peaks(setting, trajectories=4 * rows, shard_size=4 * size),
    )
    actor, driver = zip(*plain, strict=True)
    longer_actor, longer_driver = zip(*longer, strict=True)
    ten, growth_bar = "10 x the trajectories / once", "<= 1.1"
    return [
        Measurement(f"peak of an actor, {ten}", "MiB", longer_actor, actor, growth_bar),
        Measurement(f"peak of the driver, {ten}", "MiB", longer_driver, driver, growth_bar),
        Measurement("peak of an actor, shards of 4 x the rows / once", "MiB", tuple(each for each, _ in larger), actor),
    ]


def rollout_peaks(setting: Setting, **options: Any) -> tuple[float, float]:
    """The peak resident memory of the actor and of the driver during a rollout on one actor, MiB."""
    RESET_FILE.write_text("5")  # resets the peak of this process, see proc_pid_clear_refs(5)
    # One solver step per knot needs the same memory as five and a fifth of the time.
    outcomes = run_and_remove(setting.rollout_spec("memory", actors=1, solver_steps=20, **options))
    return max(outcome.peak_memory or 0 for outcome in outcomes) / 1024, (peak_memory() or 0) / 1024
