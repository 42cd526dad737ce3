"""The benchmark's part for GPUs: networks of the recipes' sizes in every precision, rollouts, and training.

On a CPU, it measures small networks of the same kinds, so that it can be tried on any machine.
"""

import functools
import json
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from kac.data import ArrayData, DataConfig, open_dataset
from kac.losses.flow_matching import flow_matching_loss
from kac.losses.objectives import FlowMapConfig
from kac.losses.refinement import DataRefinementConfig, NoRefinementConfig, RefinementConfig
from kac.model import load_config, load_model
from kac.networks import MLPConfig, NetworkConfig, UNetConfig, VelocityNetwork
from kac.networks.cost import network_cost
from kac.networks.dit import DiTConfig
from kac.precision import Precision
from kac.sampling import Sampling, generate, initial_noise
from kac.solvers import evaluations
from kac.util import files
from kac.util.device import default_device, to_device
from pipeline import training
from pipeline.benchmark import CALLS_PER_SHARD, MIN_SHARDS, Measurement, Setting, interleave, make_setting
from pipeline.benchmark.parts import actor_speed, window_speeds
from pipeline.cluster import connection as cluster
from pipeline.config import DistillSpec, OptimizerConfig, TeachSpec
from pipeline.distill import DistillTask
from pipeline.memory import peak_bytes
from pipeline.teach import TeachTask
from pipeline.tracking import TrackedRun
from pipeline.training.loop import LOG_UPDATES

SOLVER_STEPS, SEED = 20, 0
MATRIX_WIDTHS = {True: 8192, False: 1024}  # on a GPU, and on a CPU
NO_REFINEMENT = NoRefinementConfig()
FLOAT32, BFLOAT16 = Precision(compile=False), Precision(dtype="bfloat16", compile=False)


class Case(NamedTuple):
    """A network to measure, its data, and its batch size."""

    name: str
    network: NetworkConfig
    data: DataConfig
    batch_size: int


def cases(on_gpu: bool) -> list[Case]:
    """The networks of the recipes digits, cifar10-duong and dit-s-2, or small networks of the same kinds for a CPU."""
    digits = DataConfig()
    if not on_gpu:
        unet = UNetConfig(channels=(8, 16), blocks=1, groups=8, patch=2)
        dit = DiTConfig(heads=2, head_channels=16, depth=1)
        return [
            Case("MLP", MLPConfig(width=32, depth=1), digits, 64),
            Case("U-Net", unet, digits, 16),
            Case("DiT", dit, digits, 16),
        ]
    images = DataConfig(kind="outside", factory=f"{__name__}:random_images")
    unet = UNetConfig(channels=(128, 256, 256, 256), attention=(16,), head_channels=64, dropout=0.1, time_scale=1)
    return [
        Case("MLP", MLPConfig(), digits, 1024),
        Case("U-Net", unet, images, 256),
        Case("DiT", DiTConfig(), images, 256),
    ]


def random_images() -> ArrayData:
    """Return random images of CIFAR-10's shape, because speeds do not depend on what the images show."""
    rng = np.random.default_rng(SEED)
    return ArrayData(rng.integers(0, 256, (5000, 3, 32, 32), np.uint8), np.arange(5000) % 10)


def measure_gpu(setting: Setting) -> list[Measurement]:
    """Measure each network in its own scratch folder."""
    on_gpu, measurements = bool(cluster.connect().gpus), list[Measurement]()
    for case in cases(on_gpu):
        options = {"network": case.network, "data": case.data, "batch_size": case.batch_size, "teacher": None}
        options["trajectories"] = MIN_SHARDS * CALLS_PER_SHARD * case.batch_size
        inner = make_setting(setting.spec.model_copy(update=options), files.join(setting.folder, case.name))
        speeds = network_speeds(inner, on_gpu)
        measured = [
            *compare_precisions(inner, speeds, on_gpu),
            *measure_rollouts(inner, statistics.median(speeds["bfloat16"]), on_gpu),
            *measure_training(inner),
            *measure_workers(inner),
        ]
        measurements += [replace(each, what=f"{case.name}: {each.what}") for each in measured]
    return measurements


def precisions(on_gpu: bool) -> dict[str, Precision]:
    """The precisions to compare, by name. float32 is the reference."""
    if not on_gpu:
        return {"float32": FLOAT32, "bfloat16": BFLOAT16}
    compiled = {f"{each.dtype}, compiled": each.model_copy(update={"compile": True}) for each in (FLOAT32, BFLOAT16)}
    return {"float32": FLOAT32, "tf32": Precision(dtype="tf32", compile=False), "bfloat16": BFLOAT16, **compiled}


def network_inputs(setting: Setting, precision: Precision) -> tuple[VelocityNetwork, Tensor, Tensor]:
    """The teacher's network in this precision, and one batch of noise with its labels."""
    device = default_device()
    model = load_model(setting.teacher, device)
    x_1, label = initial_noise(model.config, SEED, range(setting.spec.batch_size))
    return precision.wrap(model.network), to_device(x_1, device), to_device(label, device)


def network_speeds(setting: Setting, on_gpu: bool) -> dict[str, tuple[float, ...]]:
    """Samples per second of the network alone, in each precision."""

    def timer(precision: Precision) -> Timer:
        network, x, label = network_inputs(setting, precision)
        t = torch.full((len(x),), 0.5, device=x.device)
        call = torch.inference_mode()(functools.partial(network, x, t, label))
        call()  # compiles
        return Timer("call()", globals={"call": call})

    timers = [timer(precision) for precision in precisions(on_gpu).values()]
    sides = [functools.partial(each.blocked_autorange, min_run_time=0.2) for each in timers]
    timings = interleave(setting.spec.repeats, *sides)
    size = setting.spec.batch_size
    return {
        name: tuple(size / each.mean for each in side) for name, side in zip(precisions(on_gpu), timings, strict=True)
    }


def compare_precisions(setting: Setting, speeds: dict[str, tuple[float, ...]], on_gpu: bool) -> list[Measurement]:
    """Compare each precision with float32, and the bfloat16 network's arithmetic speed with that of a large product."""

    def endpoints(precision: Precision) -> Tensor:
        network, x_1, label = network_inputs(setting, precision)
        return generate(network, x_1, label, Sampling(0.0, SOLVER_STEPS, "ab2")).x

    reference, measurements = endpoints(FLOAT32), list[Measurement]()
    for name, precision in list(precisions(on_gpu).items())[1:]:
        error = float((endpoints(precision) - reference).square().mean().sqrt())
        measurements.append(Measurement(f"network, {name} / float32", "samples/s", speeds[name], speeds["float32"]))
        measurements.append(Measurement(f"difference of endpoints, {name} to float32", "RMS", (error,)))
    config = load_config(setting.teacher)
    flops = network_cost(config.network, config.sample_shape, config.num_classes).flops_per_call
    width = MATRIX_WIDTHS[on_gpu]
    matrix = torch.randn(width, width, device=default_device(), dtype=torch.bfloat16)
    seconds = Timer("m @ m", globals={"m": matrix}).blocked_autorange(min_run_time=0.2).mean
    fastest = tuple(flops * speed / 1e12 for speed in max(speeds.values(), key=statistics.median))
    peak = (2 * width**3 / seconds / 1e12,) * len(fastest)
    return [*measurements, Measurement("fastest network / a large bfloat16 product", "TFLOP/s", fastest, peak)]


def measure_rollouts(setting: Setting, network_speed: float, on_gpu: bool) -> list[Measurement]:
    """Compare network calls per second in a rollout with those of the network alone. Two actors share a GPU."""
    calls = evaluations(SOLVER_STEPS, "ab2")
    options: dict[str, Any] = {"precision": BFLOAT16, "solver_steps": SOLVER_STEPS}

    def speed(actors: int, w: float, **more: Any) -> tuple[float]:
        return (actor_speed(setting, actors, guidance=(w,), **options, **more) * calls * (1 if w == 0 else 2),)

    alone = (network_speed,)
    measurements = [
        Measurement("rollout, one actor / network", "calls/s", speed(1, 0.0), alone, ">= 0.9"),
        Measurement("guided rollout, one actor / network", "calls/s", speed(1, 1.0), alone, ">= 0.9"),
    ]
    if not on_gpu:
        return measurements
    two = speed(2, 0.0, gpus_per_actor=0.5)
    return [*measurements, Measurement("rollout, two actors on one GPU / network", "calls/s", two, alone)]


def measure_training(setting: Setting) -> list[Measurement]:
    """Compare a teacher's training with a bare loop, and a student's training with and without refinement."""
    teach, bare = interleave(
        setting.spec.repeats, lambda: speed_of(teach_task(setting)), functools.partial(bare_training_speed, setting)
    )
    plain, refined = interleave(
        1, lambda: student_speed(setting), lambda: student_speed(setting, DataRefinementConfig())
    )
    return [
        Measurement("teach / a bare training loop", "samples/s", teach, bare, ">= 0.9"),
        Measurement("any-step student, refined / not refined", "samples/s", refined, plain),
        Measurement("peak memory so far", "MiB", (peak_bytes(default_device()) / 2**20,)),
    ]


def teach_task(setting: Setting, updates: int = 2 * LOG_UPDATES, workers: int = 1) -> TeachTask:
    """A teacher's training, with the batch size of ``setting`` per worker."""
    data, network, out = setting.spec.data, setting.spec.network, files.join(setting.folder, "taught")
    optimizer = OptimizerConfig(updates=updates, batch_size=workers * setting.spec.batch_size)
    options: dict[str, Any] = {"optimizer": optimizer, "precision": BFLOAT16, "workers": workers}
    return TeachTask(TeachSpec(data=data, network=network, out=out, **options))


def student_speed(setting: Setting, refine: RefinementConfig = NO_REFINEMENT) -> float:
    """Samples per second of an any-step student, with the default refinement or without refinement."""
    optimizer = OptimizerConfig(updates=2 * LOG_UPDATES, batch_size=setting.spec.batch_size)
    place = {"store": setting.store().path, "out": files.join(setting.folder, "student")}
    options: dict[str, Any] = {"objective": FlowMapConfig(), "optimizer": optimizer, "precision": BFLOAT16}
    return speed_of(DistillTask(DistillSpec(**place, **options, refine=refine), setting.teacher))


def speed_of(task: TeachTask | DistillTask) -> float:
    """Samples per second of the training loop."""
    return statistics.harmonic_mean(window_speeds(task, task.spec.optimizer.updates))


def bare_training_speed(setting: Setting) -> float:
    """Samples per second of a loop with the teacher's loss and AdamW on one fixed batch, on one thread."""
    size, device = setting.spec.batch_size, default_device()
    model, data = load_model(setting.teacher, device), open_dataset(setting.spec.data).train
    network, path = BFLOAT16.wrap(model.network), model.config.path.build()
    optimizer = torch.optim.AdamW(model.network.requires_grad_().parameters(), fused=True)
    x_0, label = (to_device(part, device) for part in data.rows(torch.arange(size)))
    noise = torch.Generator(device).manual_seed(SEED)

    def update() -> None:
        optimizer.zero_grad()
        flow_matching_loss(network, path, x_0, torch.rand(size, device=device), label, noise).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return size / Timer("update()", globals={"update": update}).blocked_autorange(min_run_time=1).mean


def measure_workers(setting: Setting) -> list[Measurement]:
    """Measure the time from the start of a Ray Train worker to its first update, and the speed of two workers."""
    resources = cluster.connect()
    one = worker_speed(setting, 1)
    measurements = [Measurement("start of one Ray Train worker, up to its first update", "s", (one.start,))]
    if (resources.gpus or resources.cpus) < 2:
        return measurements
    sides = (worker_speed(setting, 2).samples_per_second,), (one.samples_per_second,)
    return [*measurements, Measurement("two workers / one, equal batches per worker", "samples/s", *sides, ">= 1.8")]


class WorkerSpeed(NamedTuple):
    """The seconds from the start of Ray Train workers to their first update, and their speed after warming up."""

    start: float
    samples_per_second: float


def worker_speed(setting: Setting, workers: int) -> WorkerSpeed:
    """Train a teacher for two windows of ``LOG_UPDATES`` updates. The second window is without start-up costs."""
    task, out = teach_task(setting, workers=workers), files.join(setting.folder, f"workers-{workers}")
    updates, started = task.spec.optimizer.updates, time.time()
    job = training.Job(task, "benchmark", out, SpeedFiles("", "", out), checkpoint_updates=updates)
    training.train(job, training.choose_workers(task.spec))
    windows = [json.loads(files.read_bytes(SpeedFiles.path(out, step))) for step in (updates // 2, updates)]
    (first_end, first_speed), (_, speed) = windows
    first_seconds = updates // 2 * task.spec.optimizer.batch_size / first_speed
    return WorkerSpeed(first_end - first_seconds - started, speed)


@dataclass(frozen=True)
class SpeedFiles(TrackedRun):
    """Replaces an MLflow run in a worker. Writes each window's end time and speed to a file in ``folder``."""

    folder: str = ""

    @staticmethod
    def path(folder: str, step: int) -> str:
        """The file of the window that ends after ``step`` updates."""
        return files.join(folder, f"speed-{step}.json")

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Write the logged speed."""
        record = json.dumps([time.time(), values["samples_per_second"]])
        files.write_bytes(self.path(self.folder, step), record.encode())
