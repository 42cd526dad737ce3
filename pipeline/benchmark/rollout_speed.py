"""Rollout speed in steady state: one actor compared with a bare loop, and several actors with one."""

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
from pipeline.config import RolloutSpec
from pipeline.rollout.actors import SHARDS_IN_FLIGHT

UNIT = "trajectories/s"
ACTOR_BAR = 0.95
SCALING_BAR = 0.9
"""Fraction of ideal scaling: two actors must be at least 1.8 times as fast as one."""


def measure(setting: Setting) -> list[Measurement]:
    """Compare one actor with a bare loop, and one actor with two and with as many as the cluster can run.

    Without a GPU, also compare two concurrent bare loops with one. Two cores share memory bandwidth and clock speed, so
    this ratio is an upper limit for two actors.
    """
    resources = cluster.connect()
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
        Measurement("one actor / a bare loop of one thread", UNIT, one, bare, Bar(">=", ACTOR_BAR)),
        *(Measurement(f"{n} actors / one actor", UNIT, more.pop(0), one, Bar(">=", SCALING_BAR * n)) for n in counts),
        *(Measurement(f"{n} bare loops at once / one", UNIT, more.pop(0), bare) for n in loops),
    ]


def actor_speed(setting: Setting, actors: int) -> float:
    """Trajectories per second of a rollout on ``actors`` actors, in steady state."""
    spec = setting.rollout_spec(f"actors-{actors}", actors=actors, trajectories=actors * setting.spec.trajectories)
    try:
        finished = [outcome.finished for outcome in compute_unsealed(spec)]
        return steady_rate(finished, actors) * spec.shard_size
    finally:
        files.remove_tree(spec.store)


def steady_rate(finished: Sequence[float], actors: int) -> float:
    """Shards per second while all actors are warm and busy.

    The clock starts when every actor has finished its first, slow shards. It stops when ``actors`` shards are left,
    because actors may be idle after that. In between, all actors finish the same number of shards.

    Args:
        finished: ascending times at which the shards were published, in seconds.

    Raises:
        ValueError: there are too few shards.
    """
    slow = SHARDS_IN_FLIGHT * actors
    if len(finished) < slow + 2 * actors:
        raise ValueError(f"{len(finished)} shards are too few for {actors} actors; {slow + 2 * actors} are needed.")
    first, last = slow - 1, len(finished) - 1 - actors
    return (last - first) / (finished[last] - finished[first])


def bare_speed(setting: Setting, loops: int = 1) -> float:
    """Trajectories per second of ``loops`` concurrent bare loops, each in a new process with one thread."""
    spec, spawn = setting.rollout_spec("bare"), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(loops, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return sum(pool.map(loop_speed, [spec] * loops))


def loop_speed(spec: RolloutSpec) -> float:
    """Trajectories per second of the teacher on the batches of a rollout, without Ray or a store."""
    model = load_model(spec.teacher, default_device())
    batches = prepare(spec, model)
    follow(spec, model, *batches[0])  # warms up
    _synchronize()
    started = time.perf_counter()
    for x_1, label in batches:
        follow(spec, model, x_1, label)
    _synchronize()
    return spec.trajectories / (time.perf_counter() - started)


def prepare(spec: RolloutSpec, model: Model) -> list[tuple[Tensor, Tensor]]:
    """The noise and labels of every batch of the rollout, on the device."""
    ids = range(spec.first_sample, spec.first_sample + spec.trajectories)
    x_1, label = (part.to(default_device()) for part in initial_noise(model.config, spec.seed, ids))
    return list(zip(torch.split(x_1, spec.batch_size), torch.split(label, spec.batch_size), strict=True))


def follow(spec: RolloutSpec, model: Model, x_1: Tensor, label: Tensor) -> Tensor:
    """The teacher's samples from noise ``x_1``: [batch, *sample]."""
    sampling = Sampling(spec.guidance[0], spec.solver_steps, spec.solver, spec.knot_grid)
    return generate(spec.precision.wrap(model.network), x_1, label, sampling).x


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
