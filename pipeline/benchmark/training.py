"""Distillation as the benchmark trains it: from the store, from tensors in memory, and with the teacher in the loop."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kac import files
from kac.checkpoint import Model, load_model
from kac.data import open_dataset
from kac.device import default_device
from kac.guidance import guide
from kac.networks import NetworkModule, VelocityNetwork
from kac.objectives import EndpointObjective, Interval
from kac.solvers import Method, knot_times, solve
from pipeline import training
from pipeline.benchmark.setting import STUDENT_STEPS, Setting
from pipeline.config import DistillSpec, OptimizerConfig
from pipeline.distill import DistillTask
from pipeline.tracking import TrackedRun
from pipeline.training.loop import LOG_UPDATES, run_updates

UNIT = "samples/s"


def updates_of(setting: Setting, rows: int) -> int:
    """A window of the loop to warm up, and at least one epoch of ``rows``."""
    epoch = rows / setting.spec.batch_size
    return LOG_UPDATES * (1 + math.ceil(epoch / LOG_UPDATES))


def optimizer(setting: Setting, updates: int) -> OptimizerConfig:
    """The same for every side."""
    return OptimizerConfig(updates=updates, batch_size=setting.spec.batch_size)


def store_task(setting: Setting, store: str, updates: int, memory_gib: float = 4.0) -> DistillTask:
    """What ``jobs.distill`` trains."""
    spec = DistillSpec(
        store=store,
        out=files.join(setting.folder, "student"),
        steps=STUDENT_STEPS,
        optimizer=optimizer(setting, updates),
        memory_gib=memory_gib,
    )
    return DistillTask(spec, setting.teacher)


@dataclass(frozen=True)
class Windows(TrackedRun):
    """In the place of an MLflow run: keeps the loop's own speed of each window of ``LOG_UPDATES`` updates."""

    speeds: list[float] = field(default_factory=list)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Keep the speed."""
        self.speeds.append(values["samples_per_second"])


def task_speed(task: training.Task) -> float:
    """Samples a second of the training loop in this process, without its first window, in which the rows are loaded."""
    run = Windows("", "")
    job = training.Job(task, "benchmark", "", run, checkpoint_updates=task.optimizer.updates)
    run_updates(job, training.Worker(0, 1, default_device()), lambda metrics, state: None, None)
    speeds = run.speeds[1:] or run.speeds
    return len(speeds) / sum(1 / speed for speed in speeds)


@dataclass(frozen=True)
class TensorTask:
    """Endpoint distillation from tensors in memory: what a loop without a store would do."""

    optimizer: OptimizerConfig
    init: str
    knots: Tensor  # [rows, STUDENT_STEPS + 1, *sample]
    label: Tensor  # [rows]

    def build(self, worker: training.Worker) -> training.Learner:
        """The student with its first weights."""
        rows, times = self._rows(), knot_times(STUDENT_STEPS).float()

        def losses(network: VelocityNetwork, update: int) -> dict[str, Tensor]:
            row = next(rows)
            k = torch.randint(STUDENT_STEPS, row.shape)
            batch = (self.knots[row, k], self.knots[row, k + 1], times[k], times[k + 1], self.label[row])
            interval = Interval(*(part.to(worker.device) for part in batch))
            return EndpointObjective(STUDENT_STEPS).losses(network, interval)

        return training.NetworkLearner(_trainable(load_model(self.init)), losses, self.optimizer, worker)

    def _rows(self) -> Iterator[Tensor]:
        """Endless full batches of shuffled epochs."""
        size = self.optimizer.batch_size
        while True:
            order = torch.randperm(len(self.label))
            yield from (batch for batch in torch.split(order, size) if len(batch) == size)


@dataclass(frozen=True)
class OnlineTask:
    """Endpoint distillation without a store: every update noises data points to the start of an interval and follows
    the teacher through it (arXiv 2509.21513, Algorithm 1, with one interval a batch)."""

    optimizer: OptimizerConfig
    teacher: str
    solver: Method = "ab2"
    solver_steps: int = 100

    def build(self, worker: training.Worker) -> training.Learner:
        """The student with its first weights."""
        teacher = load_model(self.teacher, worker.device)
        data, path = open_dataset(teacher.config.data).train, teacher.config.path.build()
        size, times = self.optimizer.batch_size, knot_times(STUDENT_STEPS).float()

        def losses(network: VelocityNetwork, update: int) -> dict[str, Tensor]:
            k = update % STUDENT_STEPS
            images, label = (part.to(worker.device) for part in data.rows(torch.randint(len(data), (size,))))
            t_start, t_end = (times[i].expand(size).to(worker.device) for i in (k, k + 1))
            x_start = path.sample(images, t_start).x_t
            x_end = self.endpoint(teacher, x_start, label, k)
            interval = Interval(x_start, x_end, t_start, t_end, label)
            return EndpointObjective(STUDENT_STEPS).losses(network, interval)

        return training.NetworkLearner(_trainable(load_model(self.teacher)), losses, self.optimizer, worker)

    @torch.no_grad()
    def endpoint(self, teacher: Model, x_start: Tensor, label: Tensor, k: int) -> Tensor:
        """Where the teacher's solver steps on the student's k-th interval end: [batch, *sample]."""
        every = self.solver_steps // STUDENT_STEPS
        times = knot_times(self.solver_steps)[k * every : (k + 1) * every + 1]
        return solve(guide(teacher.network, 0.0).given(label), x_start, times, self.solver).x


def _trainable(model: Model) -> NetworkModule:
    return model.network.requires_grad_(True)
