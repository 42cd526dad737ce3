"""The benchmark's parts, which measure the speed and memory of rollouts, and the store's size and reading speed."""

import functools
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import ray
import torch
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from torch import Tensor
from torch.utils.benchmark import Timer

from kac.conditioning import network_labels
from kac.data import open_dataset
from kac.guidance import guide
from kac.losses import EndpointObjective, Interval
from kac.model import load_model
from kac.sampling import Sampling, draw
from kac.solvers import knot_times, solve
from kac.util import files
from kac.util.device import default_device, to_device
from kac.util.log import log
from pipeline import store, training
from pipeline.benchmark import CALLS_PER_SHARD, STORE_FACTOR, Measurement, Setting, interleave
from pipeline.cluster import connection as cluster
from pipeline.cluster.placement import choose_actors
from pipeline.config import DistillSpec, OptimizerConfig, RolloutSpec
from pipeline.distill import DistillTask
from pipeline.memory import peak_memory
from pipeline.rollout import ShardOutcome, compute_shards, make_plan
from pipeline.rollout.actors import SHARDS_IN_FLIGHT
from pipeline.store.layout import MANIFEST
from pipeline.store.manifest import list_shards
from pipeline.store.shards import adopt, column_array, encode, publish, read_rows
from pipeline.tracking import TrackedRun
from pipeline.training.loop import LOG_UPDATES, run_updates

RESET_FILE = Path("/proc/self/clear_refs")

STUDENT_STEPS, SOLVER_STEPS, ONLINE_UPDATES = 4, 100, 20
COMPRESSIONS = ("none", "zstd", "lz4")

Batches = Callable[[int], Interval]  # returns the batch of an update


def measure_rollout_speed(setting: Setting) -> list[Measurement]:
    """Compare one actor with a bare loop, with two actors, and with the maximum number of actors.

    Without a GPU, also compare two concurrent bare loops with one loop. Two cores share memory bandwidth and clock
    speed, so this ratio is an upper limit for two actors.
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
    """Trajectories per second of the teacher on a rollout's batches, without Ray Data or a store."""
    model = load_model(spec.teacher, default_device())
    sampling = Sampling(spec.guidance[0], spec.solver_steps, spec.solver, spec.knot_grid, spec.time_factor)
    loop = functools.partial(draw, model, sampling, spec.precision, spec.seed, first=spec.first_sample, raw=True)
    loop(spec.batch_size, spec.batch_size)  # warms up
    return spec.trajectories / loop(spec.trajectories, spec.batch_size).seconds


def actor_speed(setting: Setting, actors: int, **options: Any) -> float:
    """Trajectories per second of a rollout on ``actors`` actors, in steady state. ``options`` are a rollout's."""
    size = {"actors": actors, "trajectories": actors * setting.spec.trajectories}
    spec = setting.rollout_spec(f"actors-{actors}", **size, **options)
    return steady_rate([outcome.finished for outcome in run_and_remove(spec)], actors) * spec.shard_size


def run_and_remove(spec: RolloutSpec) -> list[ShardOutcome]:
    """Run a rollout when all actors are ready, and remove its store. Return the outcomes in order of completion."""
    context = ray.data.DataContext.get_current().copy()
    context.wait_for_min_actors_s = 600
    with ray.data.DataContext.current(context):
        outcomes = compute_shards(spec, make_plan(spec))
    files.remove_tree(spec.store)
    return sorted(outcomes, key=lambda outcome: outcome.finished)


def steady_rate(finished: Sequence[float], actors: int) -> float:
    """Shards per second while all actors are warm and busy, from the ascending times at which shards were published.

    The clock starts when every actor has finished its first, slow shards. It stops when ``actors`` shards are left,
    because actors may be idle after that. Between these times, all actors finish the same number of shards.
    """
    first, last = SHARDS_IN_FLIGHT * actors - 1, len(finished) - 1 - actors
    return (last - first) / (finished[last] - finished[first])


def measure_peak_memory(setting: Setting) -> list[Measurement]:
    """Measure how ten times the trajectories, or shards four times as large, change a rollout's peak memory."""
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
    ten = "10 x the trajectories / once"
    return [
        Measurement(f"peak of an actor, {ten}", "MiB", longer_actor, actor, "<= 1.1"),
        Measurement(f"peak of the driver, {ten}", "MiB", longer_driver, driver, "<= 1.1"),
        Measurement("peak of an actor, shards of 4 x the rows / once", "MiB", tuple(each for each, _ in larger), actor),
    ]


def rollout_peaks(setting: Setting, **options: Any) -> tuple[float, float]:
    """The peak resident memory of the actor and of the driver during a rollout on one actor, in MiB."""
    RESET_FILE.write_text("5")  # resets the peak of this process, see proc_pid_clear_refs(5)
    # One solver step per knot needs as much memory as five steps, but only a fifth of the time.
    outcomes = run_and_remove(setting.rollout_spec("memory", actors=1, solver_steps=20, **options))
    return max(outcome.peak_memory or 0 for outcome in outcomes) / 1024, (peak_memory() or 0) / 1024


def measure_distill_speed(setting: Setting) -> list[Measurement]:
    """Compare training on the store, loaded once or streamed, with the same loop over tensors in memory."""
    source = setting.store()
    knots = EndpointObjective(STUDENT_STEPS).knots(source.identity.knots)
    whole = next(source.batches(source.rows(0.0), knots=knots))
    batch = tensor_batches(whole.knots, whole.label, setting.spec.batch_size)
    tensors, loaded, streamed = interleave(
        setting.spec.repeats,
        lambda: speed(setting, batch=batch),
        lambda: speed(setting),
        lambda: speed(setting, memory_gib=whole.knots.nbytes / 4 / 2**30),  # a quarter of the knots fits
    )
    return [
        Measurement("store, loaded once / tensors in memory", "samples/s", loaded, tensors, ">= 0.95"),
        Measurement("store, streamed / tensors in memory", "samples/s", streamed, tensors, ">= 0.9"),
    ]


def measure_online_speed(setting: Setting) -> list[Measurement]:
    """Compare training on the store with training that runs the teacher in the training loop."""
    setting.store()
    sides = (
        functools.partial(speed, setting),
        functools.partial(speed, setting, ONLINE_UPDATES, online_batches(setting)),
    )
    loaded, online = interleave(setting.spec.repeats, *sides)
    return [Measurement("store, loaded once / the teacher in the training loop", "samples/s", loaded, online)]


def speed(setting: Setting, updates: int = 0, batch: Batches | None = None, memory_gib: float = 4.0) -> float:
    """Samples per second of the training loop on one thread, excluding the first window, which loads the rows.

    By default, the loop trains on the store for at least one epoch after the first window.
    """
    size = setting.spec.batch_size
    updates = updates or LOG_UPDATES * (1 + math.ceil(STORE_FACTOR * setting.spec.trajectories / size / LOG_UPDATES))
    place = {"store": setting.rollout_spec("store").store, "out": files.join(setting.folder, "student")}
    optimizer = OptimizerConfig(updates=updates, batch_size=size)
    spec = DistillSpec(**place, steps=STUDENT_STEPS, optimizer=optimizer, memory_gib=memory_gib)
    return statistics.harmonic_mean(window_speeds(DistillTask(spec, setting.teacher, batch), updates))


def window_speeds(task: training.Task, updates: int) -> list[float]:
    """Samples per second of the training loop on one thread, per window, without the first window if there are more."""
    run, threads = SpeedRecorder("", ""), torch.get_num_threads()
    job = training.Job(task, "benchmark", "", run, checkpoint_updates=updates)
    torch.set_num_threads(1)  # like a worker with one CPU
    try:
        run_updates(job, training.Worker(0, 1, default_device()), lambda metrics, state: None, None)
    finally:
        torch.set_num_threads(threads)
    return run.speeds[1:] or run.speeds


@dataclass(frozen=True)
class SpeedRecorder(TrackedRun):
    """Replaces an MLflow run. Keeps the speed that the loop logs for each window of ``LOG_UPDATES`` updates."""

    speeds: list[float] = field(default_factory=list)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Keep the logged speed."""
        self.speeds.append(values["samples_per_second"])


def tensor_batches(knots: Tensor, label: Tensor, size: int) -> Batches:
    """Return a function that draws ``size`` random intervals of random rows, like a loop without a store."""
    times, device = knot_times(STUDENT_STEPS).float(), default_device()

    def batch(update: int) -> Interval:
        row, k = torch.randint(len(label), (size,)), torch.randint(STUDENT_STEPS, (size,))
        parts = (knots[row, k], knots[row, k + 1], times[k], times[k + 1], label[row], torch.zeros(size))
        return Interval(*(to_device(part, device) for part in parts))

    return batch


def online_batches(setting: Setting) -> Batches:
    """Return a function that adds noise to data up to an interval's start and runs the teacher to its end.

    This is Algorithm 1 of arXiv 2509.21513 with one interval per batch.
    """
    size, device = setting.spec.batch_size, default_device()
    teacher = load_model(setting.teacher, device)
    data, path = open_dataset(teacher.config.data).train, teacher.config.path.build()
    times, every = knot_times(SOLVER_STEPS), SOLVER_STEPS // STUDENT_STEPS

    @torch.no_grad()
    def batch(update: int) -> Interval:
        k = update % STUDENT_STEPS
        images, classes = (to_device(part, device) for part in data.rows(torch.randint(len(data), (size,))))
        label = network_labels(teacher.config, classes)
        between = times[k * every : (k + 1) * every + 1]
        t_start, t_end = (torch.full((size,), float(t), device=device) for t in (between[0], between[-1]))
        x_start = path.sample(images, t_start).x_t
        x_end = solve(guide(teacher.network, 0.0, label), x_start, between, "ab2").x
        return Interval(x_start, x_end, t_start, t_end, label, torch.zeros_like(t_start))

    return batch


def measure_bytes_read(setting: Setting) -> list[Measurement]:
    """Compare the store's size with the bytes read to train students with 1, a few and all steps."""
    source, measurements = setting.store(), []
    fsspec.register_implementation(CountingFileSystem.protocol, CountingFileSystem, clobber=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in (MANIFEST, *list_shards(source.path)):
            files.write_bytes(f"{folder}/{name}", files.read_bytes(files.join(source.path, name)))
        size = sum(files.list_sizes(folder).values())
        for steps, bar in ((1, "<= 0.12"), (STUDENT_STEPS, None), (source.identity.knots, None)):
            count = count_bytes(f"{CountingFileSystem.protocol}://{folder}", steps)
            what = f"bytes read to train {steps} step{'s' * (steps > 1)} / bytes of the store"
            measurements.append(Measurement(what, "bytes", (count,), (size,), bar))
    return measurements


def count_bytes(path: str, steps: int) -> int:
    """Bytes read to open the store and load all rows for a student with ``steps`` steps."""
    CountingFileSystem.reads.clear()
    next(store.open(path).interval_batches(1, EndpointObjective(steps)))
    return sum(CountingFileSystem.reads)


class CountingFileSystem(LocalFileSystem):  # type: ignore[misc]
    """Local files under ``counted://``. Counts the bytes of each read, which on S3 would be a range request."""

    protocol = "counted"
    reads: ClassVar[list[int]] = []  # on the class, because fsspec makes one instance per thread

    def _open(self, path: str, mode: str = "rb", **options: Any) -> LocalFileOpener:
        file = super()._open(path, mode, **options)
        read = file.read

        def counted_read(*size: int) -> bytes:
            data: bytes = read(*size)
            self.reads.append(len(data))
            return data

        file.read = counted_read
        return file


def measure_bytes_stored(setting: Setting) -> list[Measurement]:
    """Measure one shard of the default size with every compression. Speeds refer to the tensors' uncompressed bytes."""
    source = setting.store()
    identity, shard = source.identity, source.shards[0]
    table = adopt(source.path, shard, identity)[1]
    raw = sum(column_array(table[name]).nbytes for name in identity.knot_columns)
    measurements, work = [], {}
    for name in COMPRESSIONS:
        path = files.join(setting.folder, f"compressed-{name}")
        size = publish(path, shard, identity, encode(table, name)).bytes
        bar = "<= 1.03" if name == "none" else None
        measurements.append(Measurement(f"stored, {name} / bytes of the tensors", "bytes", (size,), (raw,), bar))
        work["encode", name] = functools.partial(encode, table, name)
        work["read", name] = functools.partial(read_rows, path, identity, shard, identity.knot_columns)
    timers = [Timer("work()", globals={"work": each}) for each in work.values()]
    sides = [functools.partial(timer.blocked_autorange, min_run_time=0.1) for timer in timers]
    turns = zip(work, interleave(setting.spec.repeats, *sides), strict=True)
    speeds = {key: tuple(raw / 1e6 / timing.mean for timing in timings) for key, timings in turns}
    for (action, name), values in speeds.items():
        plain = () if name == "none" else speeds[action, "none"]
        measurements.append(Measurement(f"{action}, {name} / none", "MB/s", values, plain))
    return measurements


PARTS: dict[str, Callable[[Setting], list[Measurement]]] = {  # in running order; the first part measures this process
    "peak-memory": measure_peak_memory,
    "rollout-speed": measure_rollout_speed,
    "distill-speed": measure_distill_speed,
    "bytes-read": measure_bytes_read,
    "bytes-stored": measure_bytes_stored,
    "online-speed": measure_online_speed,
}
