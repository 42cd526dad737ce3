"""(b) Distillation from the store against the same loop over tensors in memory, and (g) against one without a store."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kac import files
from kac.checkpoint import Model, load_model
from kac.data import load_dataset
from kac.guidance import guide
from kac.solvers import Method, solve, uniform_times
from kac.student import endpoint_loss
from pipeline import training
from pipeline.benchmark.measurement import Bar, Measurement, interleave, one_thread
from pipeline.benchmark.setting import STUDENT_STEPS, Setting
from pipeline.config import DistillSpec, OptimizerConfig
from pipeline.distill import DistillTask
from pipeline.tracking import TrackedRun

UNIT = "samples/s"
LOADED_BAR, STREAMED_BAR = 0.95, 0.6
STREAMED_SHARE = 4
"""How many times larger than its memory budget the streamed store is."""
ONLINE_UPDATES = 20


def store_speed(setting: Setting) -> list[Measurement]:
    """The store loaded once, and the store streamed by Ray Data, each against tensors in memory."""
    source = setting.rolled_store()
    every = source.spec.knots // STUDENT_STEPS
    whole = next(source.batches(source.rows(0.0), knots=range(0, source.spec.knots + 1, every)))
    updates = _updates(setting, len(whole.label))
    budget = whole.knots.nbytes / STREAMED_SHARE / 2**30
    with one_thread():
        tensors, loaded, streamed = interleave(
            setting.spec.repeats,
            lambda: task_speed(TensorTask(optimizer(setting, updates), setting.teacher, whole.knots, whole.label)),
            lambda: task_speed(store_task(setting, source.path, updates)),
            lambda: task_speed(store_task(setting, source.path, updates, memory_gib=budget)),
        )
    return [
        Measurement("b", "store, loaded once / tensors in memory", UNIT, loaded, tensors, Bar(">=", LOADED_BAR)),
        Measurement("b", "store, streamed / tensors in memory", UNIT, streamed, tensors, Bar(">=", STREAMED_BAR)),
    ]


def online_speed(setting: Setting) -> list[Measurement]:
    """The store against a teacher inside the training loop."""
    source = setting.rolled_store()
    updates = _updates(setting, source.rows(0.0))
    with one_thread():
        loaded, online = interleave(
            setting.spec.repeats,
            lambda: task_speed(store_task(setting, source.path, updates)),
            lambda: task_speed(OnlineTask(optimizer(setting, ONLINE_UPDATES), setting.teacher)),
        )
    return [Measurement("g", "store, loaded once / the teacher in the training loop", UNIT, loaded, online)]


def _updates(setting: Setting, rows: int) -> int:
    """A window of the loop to warm up, and at least one epoch of ``rows``."""
    epoch = rows / setting.spec.batch_size
    return training.LOG_UPDATES * (1 + math.ceil(epoch / training.LOG_UPDATES))


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training.loop(job, training.Worker(0, 1, device), lambda metrics, state: None, None)
    speeds = run.speeds[1:] or run.speeds
    return len(speeds) / sum(1 / speed for speed in speeds)


@dataclass(frozen=True)
class TensorTask:
    """Endpoint distillation from tensors in memory: what a loop without a store would do."""

    optimizer: OptimizerConfig
    init: str
    knots: Tensor  # [rows, STUDENT_STEPS + 1, *sample]
    label: Tensor  # [rows]

    def build(self, worker: training.Worker) -> tuple[nn.Module, training.Loss]:
        """The student, and its loss on the tensors."""
        network = load_model(self.init).network.requires_grad_(True)
        rows = self._rows()

        def loss(model: nn.Module, update: int) -> Tensor:
            row = next(rows)
            k = torch.randint(STUDENT_STEPS, row.shape)
            t_start, t_end = 1 - k / STUDENT_STEPS, 1 - (k + 1) / STUDENT_STEPS
            batch = (self.knots[row, k], self.knots[row, k + 1], t_start, t_end, self.label[row])
            return endpoint_loss(model, *(part.to(worker.device) for part in batch))

        return network, loss

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

    def build(self, worker: training.Worker) -> tuple[nn.Module, training.Loss]:
        """The student, and its loss on what the teacher has just made."""
        teacher = load_model(self.teacher, worker.device)
        network = load_model(self.teacher).network.requires_grad_(True)
        data, path = load_dataset(teacher.config.data), teacher.config.path.build()
        images, labels = data.images.to(worker.device), data.labels.to(worker.device)
        endpoints, size = self.endpoints(teacher), self.optimizer.batch_size

        def loss(model: nn.Module, update: int) -> Tensor:
            k = update % STUDENT_STEPS
            row = torch.randint(len(labels), (size,), device=worker.device)
            t_start = torch.full((size,), 1 - k / STUDENT_STEPS, device=worker.device)
            x_start = path.sample(images[row], t_start).x_t
            x_end = endpoints(x_start, labels[row], k)
            return endpoint_loss(model, x_start, x_end, t_start, t_start - 1 / STUDENT_STEPS, labels[row])

        return network, loss

    def endpoints(self, teacher: Model) -> Callable[[Tensor, Tensor, int], Tensor]:
        """(x_start, label, k) -> where the teacher's solver steps on the student's k-th interval end."""
        velocity, steps = guide(teacher.network, 0.0), self.solver_steps // STUDENT_STEPS

        @torch.no_grad()
        def follow(x_start: Tensor, label: Tensor, k: int) -> Tensor:
            times = uniform_times(steps, 1 - k / STUDENT_STEPS, 1 - (k + 1) / STUDENT_STEPS)
            return solve(velocity.given(label), x_start, times, self.solver).x

        return follow
