"""Rollout speed in steady state: an actor against a bare loop, and more actors against one."""

import functools
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from kac.model import Model, load_model
from kac.sampling import Sampling, generate, initial_noise
from kac.util import files
from kac.util.device import default_device
from pipeline.benchmark.measurement import Bar, Measurement, interleave
from pipeline.benchmark.setting import Setting, compute_unsealed
from pipeline.cluster import connection as cluster
from pipeline.config.specs import RolloutSpec
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
    """Shards a second while every actor is warm and at work.

    The clock starts when every actor has finished its first, slow shards, and stops when ``actors`` shards are left:
    until then no actor is idle. In between, all actors do the same number of shards, together or in turns.

    Args:
        finished: when each shard was published, ascending, seconds.

    Raises:
        ValueError: too few shards for that.
    """
    slow = SHARDS_IN_FLIGHT * actors
    if len(finished) < slow + 2 * actors:
        raise ValueError(f"expected at least {slow + 2 * actors} shards of {actors} actors, got {len(finished)}")
    first, last = slow - 1, len(finished) - 1 - actors
    return (last - first) / (finished[last] - finished[first])


def bare_speed(setting: Setting, loops: int = 1) -> float:
    """Trajectories a second of ``loops`` bare loops at once, each in a new process with the one thread of an actor."""
    spec, spawn = setting.rollout_spec("bare"), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(loops, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return sum(pool.map(loop_speed, [spec] * loops))


def loop_speed(spec: RolloutSpec) -> float:
    """Trajectories a second of the teacher on the batches of a rollout, without Ray or a store; one batch warms up."""
    model = load_model(spec.teacher, default_device())
    batches = prepare(spec, model)
    follow(spec, model, *batches[0])
    _wait()
    started = time.perf_counter()
    for x_1, label in batches:
        follow(spec, model, x_1, label)
    _wait()
    return spec.trajectories / (time.perf_counter() - started)


def prepare(spec: RolloutSpec, model: Model) -> list[tuple[Tensor, Tensor]]:
    """Noise and labels of every batch of the rollout, on the device."""
    ids = range(spec.first_sample, spec.first_sample + spec.trajectories)
    x_1, label = (part.to(default_device()) for part in initial_noise(model.config, spec.seed, ids))
    return list(zip(torch.split(x_1, spec.batch_size), torch.split(label, spec.batch_size), strict=True))


def follow(spec: RolloutSpec, model: Model, x_1: Tensor, label: Tensor) -> Tensor:
    """Where the teacher takes noise ``x_1`` [batch, *sample]."""
    sampling = Sampling(spec.guidance[0], spec.solver_steps, spec.solver, spec.knot_grid)
    return generate(spec.precision.wrap(model.network), x_1, label, sampling).x


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
