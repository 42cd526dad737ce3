"""The training loop: update after update, with metrics, checkpoints and a progress bar; it knows no host.

What one update does is a function of (task, update, rank, world size) alone: a resumed run goes on as if it had not
been stopped.
"""

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kac.errors import DistillKacError
from kac.metrics import Metric
from pipeline.config import OptimizerConfig
from pipeline.tracking import PART_PREFIX, TrackedRun, declare
from pipeline.training.learner import AVERAGE, Learner, Worker

LOG_UPDATES = 50

declare(
    Metric("loss", "training loss, the mean of the last updates", better="lower"),
    Metric("learning_rate", "learning rate of the last update"),
    Metric("samples_per_second", "training samples a second", better="higher"),
)

OnCheckpoint = Callable[[dict[str, float], bytes], None]
"""(metrics, training state): called equally often by every worker."""


class Task(Protocol):
    """What is trained: picklable, so that it travels to workers."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """How it is trained."""
        ...

    def build(self, worker: Worker) -> Learner:
        """What this worker trains, with its first weights."""
        ...


@dataclass(frozen=True)
class Job:
    """A task, where its results go, and how often it is saved."""

    task: Task
    title: str
    out: str
    run: TrackedRun
    checkpoint_updates: int


def run_updates(job: Job, worker: Worker, on_checkpoint: OnCheckpoint, resume: bytes | None) -> bytes:
    """Train from ``resume`` (or the start) to the last update; returns the final state.

    Raises:
        DistillKacError: the loss is not finite.
    """
    total = job.task.optimizer.updates
    learner = job.task.build(worker)
    first = _restore(learner, resume)
    window = _Window(learner, job.task.optimizer.batch_size)
    bar = _progress_bar(job.title, first, total, worker)
    state = resume
    for done in range(first + 1, total + 1):
        window.add(learner.update(done - 1))
        is_last = done == total
        if done % LOG_UPDATES == 0 or is_last:
            bar.update(len(window.parts))
            metrics = window.close()
            _check_finite(job, metrics["loss"], done)
            if worker.rank == 0:
                job.run.metrics(metrics, step=done)
        if done % job.checkpoint_updates == 0 or is_last:
            _check_finite(job, window.last_loss(), done)
            state = _save(learner, done)
            on_checkpoint({"update": float(done), "loss": window.last_loss()}, state)
    bar.close()
    return state or _save(learner, first)


def averaged_weights(state: bytes) -> dict[str, Tensor]:
    """The averaged weights in a training state: they become the model."""
    return _load(state)["learner"][AVERAGE]  # type: ignore[no-any-return]


class _Window:
    """The updates since metrics were last logged."""

    def __init__(self, learner: Learner, batch_size: int) -> None:
        self.learner, self.batch_size = learner, batch_size
        self.parts: list[dict[str, Tensor]] = []
        self.last: dict[str, Tensor] = {}
        self.started = time.perf_counter()

    def add(self, parts: dict[str, Tensor]) -> None:
        """The parts of one update's loss."""
        self.parts.append(parts)
        self.last = parts

    def last_loss(self) -> float:
        """The loss of the last update."""
        return float(sum(part.item() for part in self.last.values()))

    def close(self) -> dict[str, float]:
        """The metrics of the window; a new one begins."""
        names = dict.fromkeys(name for parts in self.parts for name in parts)
        means = {name: _mean([parts[name] for parts in self.parts if name in parts]) for name in names}
        metrics = {
            "loss": sum(means.values()),
            **{f"{PART_PREFIX}{name}": mean for name, mean in means.items()},
            "learning_rate": self.learner.learning_rate(),
            "samples_per_second": len(self.parts) * self.batch_size / (time.perf_counter() - self.started),
        }
        self.parts, self.started = [], time.perf_counter()
        return metrics


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())


def _check_finite(job: Job, loss: float, update: int) -> None:
    if not math.isfinite(loss):
        raise DistillKacError(
            f"{job.out}: expected a finite loss, found {loss} by update {update}: lower --optimizer.learning-rate"
        )


def _save(learner: Learner, update: int) -> bytes:
    sink = io.BytesIO()
    torch.save({"update": update, "learner": learner.state_dict()}, sink)
    return sink.getvalue()


def _restore(learner: Learner, resume: bytes | None) -> int:
    """Put the learner where a state was saved; returns how many updates were done by then."""
    if resume is None:
        return 0
    state = _load(resume)
    learner.load_state_dict(state["learner"])
    return int(state["update"])


def _load(data: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def _progress_bar(title: str, first: int, total: int, worker: Worker) -> Any:
    import ray
    from ray.experimental import tqdm_ray
    from tqdm import tqdm

    if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        if worker.rank == 0:
            bar = tqdm_ray.tqdm(desc=title, total=total)
            bar.update(first)
            return bar
        return tqdm(disable=True)
    return tqdm(desc=title, initial=first, total=total, unit="update", mininterval=1.0)
