"""The training loop: updates, metrics, checkpoints and a progress bar, independent of where it runs.

An update depends only on (task, update, rank, world size), so a resumed run gives the same result as an
uninterrupted one. Logged metrics are means over all workers.
"""

import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kac.metrics import Metric
from kac.networks.cost import duration
from kac.util.errors import DivergedError
from kac.util.log import log
from pipeline import claims
from pipeline.config import OptimizerConfig
from pipeline.memory import peak_bytes
from pipeline.progress import ProgressBar
from pipeline.tracking import PART_PREFIX, TrackedRun, declare
from pipeline.training.checkpoints import CheckpointSchedule
from pipeline.training.learner import AVERAGE, Learner, Progress, Worker
from pipeline.training.sheets import Sheets
from pipeline.training.validation import Validation

LOG_UPDATES = 50
SLOW_UPDATES = 10
"""The estimate of the remaining time ignores the first updates, which also load, compile and warm up."""

declare(
    Metric("loss", "training loss, mean of the updates since the last point", better="lower"),
    Metric("learning_rate", "learning rate of the last update"),
    Metric("gradient_norm", "norm of the gradient before clipping, mean of the updates since the last point"),
    Metric("samples_per_second", "training samples per second", better="higher"),
    Metric("peak_memory_bytes", "peak memory so far: of tensors on a GPU, of the process on a CPU", better="lower"),
)

Report = Callable[[dict[str, float], bytes | None], None]
"""(metrics, training state): called on every worker after each validation and each checkpoint.

The metrics are ``update``, ``loss`` and, only on the worker of rank 0, those of the last validation. The state is None
unless a checkpoint is due.
"""


class Task(Protocol):
    """What to train. A task is pickled and sent to the workers."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """The options of the optimizer."""
        ...

    def build(self, worker: Worker) -> Learner:
        """Return the learner of one worker, with its initial weights."""
        ...


@dataclass(frozen=True)
class Job:
    """A task, its output folder and tracked run, and how often to save, draw samples and validate."""

    task: Task
    title: str
    out: str
    run: TrackedRun
    checkpoint_updates: int
    sheets: Sheets = field(default_factory=Sheets)
    validation: Validation | None = None
    checkpoint_seconds: float = math.inf
    claim: str = ""  # token of the claim on ``out``


def run_updates(job: Job, worker: Worker, report: Report, resume: bytes | None) -> bytes:
    """Train from the state ``resume``, or from the start, to the last update. Return the final state.

    Raises:
        DivergedError: the loss is not finite.
        DistillKacError: another job writes to the folder now.
    """
    total = job.task.optimizer.updates
    learner = job.task.build(worker)
    first, validated = _restore(learner, resume)
    window = _Window(learner, job.task.optimizer.batch_size, worker)
    bar = ProgressBar(job.title, total, "updates", first, is_shown=worker.rank == 0)
    time_left = _TimeLeft(job.title, first, total)
    # A resumed run repeats the updates since its checkpoint. Their metrics are already logged.
    logged = _LoggedSteps(job.run, is_logging=worker.rank == 0)
    checkpoints = CheckpointSchedule(job.checkpoint_updates, job.checkpoint_seconds, worker, first, LOG_UPDATES)
    state = resume
    for done in range(first + 1, total + 1):
        window.add(learner.update(done - 1))
        is_last = done == total
        if done % LOG_UPDATES == 0 or is_last:
            count, metrics = len(window.updates), window.close()
            bar.update(count, f"loss {metrics['loss']:.4g}")
            _check_finite(job, metrics["loss"], done)
            if worker.rank == 0 and done > logged.step("loss"):
                job.run.metrics(metrics, step=done)
        if worker.rank == 0:
            time_left.update(done)
            if job.sheets.are_due(done) and done > logged.step("loss"):
                job.run.image("samples", job.sheets.draw(learner.averaged()), step=done)
        is_validated = job.validation is not None and job.validation.is_due(done)
        if is_validated and worker.rank == 0:
            with window.pause():
                validated = _validate(job, learner, done, logged)
        is_saved = checkpoints.is_due(done) or is_last
        if is_saved or is_validated:
            loss = window.last_loss()
            _check_finite(job, loss, done)
            began = checkpoints.clock()
            if is_saved:
                if worker.rank == 0:
                    claims.check(job.out, job.claim)
                state = _save(learner, done, validated)
                if worker.rank == 0:
                    job.run.flush()  # a run resumed from this checkpoint does not log these metrics again
            report({"update": float(done), "loss": loss, **validated}, state if is_saved else None)
            if is_saved:
                checkpoints.saved(done, began)
    bar.close()
    return state or _save(learner, first, validated)


def averaged_weights(state: bytes) -> dict[str, Tensor]:
    """The averaged weights in a training state, which become the model."""
    return _load(state)["learner"][AVERAGE]  # type: ignore[no-any-return]


def _validate(job: Job, learner: Learner, update: int, logged: "_LoggedSteps") -> dict[str, float]:
    """Measure the averaged network, and log and return its metrics."""
    assert job.validation is not None
    metrics = job.validation.measure(learner.averaged())
    new = {name: value for name, value in metrics.items() if update > logged.step(name)}
    if new:
        job.run.metrics(new, step=update)
    return metrics


class _LoggedSteps:
    """The steps that the tracked run had before training resumed, so that no metric is logged twice."""

    def __init__(self, run: TrackedRun, is_logging: bool) -> None:
        self.run, self.is_logging = run, is_logging
        self._steps: dict[str, int] = {}

    def step(self, name: str) -> int:
        """The last update for which the run has the metric; 0 if it has none."""
        if name not in self._steps:
            self._steps[name] = self.run.last_step(name) if self.is_logging else 0
        return self._steps[name]


class _Window:
    """The updates since metrics were last logged, on all workers."""

    def __init__(self, learner: Learner, batch_size: int, worker: Worker) -> None:
        self.learner, self.batch_size, self.worker = learner, batch_size, worker
        self.updates: list[Progress] = []
        self.last = Progress({}, {})
        self.started = time.perf_counter()

    def add(self, update: Progress) -> None:
        """Add the progress of an update."""
        self.updates.append(update)
        self.last = update

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time in this context from the training speed."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def last_loss(self) -> float:
        """The loss of the last update."""
        return sum(_means([self.last.losses]).values())

    def close(self) -> dict[str, float]:
        """Return the metrics of the window and start a new one."""
        losses = _means([update.losses for update in self.updates])
        metrics = {
            "loss": sum(losses.values()),
            **{f"{PART_PREFIX}{name}": mean for name, mean in losses.items()},
            **_means([update.diagnostics for update in self.updates]),
            "learning_rate": self.learner.learning_rate(),
            "samples_per_second": len(self.updates) * self.batch_size / (time.perf_counter() - self.started),
            "peak_memory_bytes": float(peak_bytes(self.worker.device)),
        }
        self.updates, self.started = [], time.perf_counter()
        return metrics


def _means(scalars: list[dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each scalar over updates and workers. All workers must pass the same names."""
    names = list(dict.fromkeys(name for each in scalars for name in each))
    if not names:
        return {}
    means = torch.stack([torch.stack([each[name] for each in scalars if name in each]).mean() for name in names])
    if dist.is_initialized():
        dist.all_reduce(means)
        means /= dist.get_world_size()
    return dict(zip(names, means.tolist(), strict=True))


class _TimeLeft:
    """Logs the estimated remaining time once, after enough updates for an estimate."""

    def __init__(self, title: str, first: int, total: int) -> None:
        self.title, self.first, self.total = title, first, total
        self.started = time.perf_counter()

    def update(self, update: int) -> None:
        """Record that ``update`` is done."""
        if update == self.first + SLOW_UPDATES:
            self.started = time.perf_counter()
        if update == self.first + LOG_UPDATES and update < self.total:
            seconds = (time.perf_counter() - self.started) / (LOG_UPDATES - SLOW_UPDATES)
            log.info(f"{self.title}: about {duration(seconds * (self.total - update))} left")


def _check_finite(job: Job, loss: float, update: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"{job.out}: the loss is {loss} at update {update}. Lower `optimizer.learning_rate`.")


def _save(learner: Learner, update: int, validated: dict[str, float]) -> bytes:
    sink = io.BytesIO()
    torch.save({"update": update, "learner": learner.state_dict(), "validated": validated}, sink)
    return sink.getvalue()


def _restore(learner: Learner, resume: bytes | None) -> tuple[int, dict[str, float]]:
    """Load a saved state into the learner. Return its number of updates and its last validation metrics."""
    if resume is None:
        return 0, {}
    state = _load(resume)
    learner.load_state_dict(state["learner"])
    return int(state["update"]), state.get("validated", {})


def _load(data: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state
