"""The training loop: updates, metrics, checkpoints and a progress bar, independent of where it runs.

An update depends only on (task, update, rank, world size), so a resumed run gives the same result as an
uninterrupted one. Logged metrics are means over all workers.
"""

import functools
import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kac.losses import LossTerms
from kac.metrics import Metric
from kac.util.errors import DivergedError
from pipeline import claims
from pipeline.config import OptimizerConfig
from pipeline.memory import peak_bytes
from pipeline.progress import ProgressBar
from pipeline.tracking import PART_PREFIX, TrackedRun, declare
from pipeline.training.batches import Worker
from pipeline.training.checkpoints import CheckpointSchedule
from pipeline.training.learner import AVERAGE, Learner, learning_rate
from pipeline.training.validation import Validation

LOG_UPDATES = 50

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
    """A task, its output folder and tracked run, and how often to save and validate."""

    task: Task
    title: str
    out: str
    run: TrackedRun
    checkpoint_updates: int
    checkpoint_seconds: float = math.inf
    validation: Validation | None = None
    claim: str = ""  # token of the claim on ``out``


def run_updates(job: Job, worker: Worker, report: Report, resume: bytes | None) -> bytes:
    """Train from the state ``resume``, or from the start, to the last update. Return the final state.

    Raises:
        DivergedError: the loss is not finite.
        DistillKacError: another job writes to the folder now.
    """
    total, is_main, validation = job.task.optimizer.updates, worker.rank == 0, job.validation
    learner = job.task.build(worker)
    first, validated = _restore(learner, resume)
    window = _Window(job, worker)
    bar = ProgressBar(job.title, total, "updates", first, is_shown=is_main)
    # A resumed run repeats the updates since its checkpoint. Their metrics are already logged.
    last_logged = functools.cache(job.run.last_step)
    checkpoints = CheckpointSchedule(job.checkpoint_updates, job.checkpoint_seconds, worker, first, LOG_UPDATES)
    state = resume
    for done in range(first + 1, total + 1):
        window.updates.append(learner.update(done - 1))
        is_last = done == total
        latest = window.updates[-1:]
        if done % LOG_UPDATES == 0 or is_last:
            count, metrics = len(window.updates), window.close(done)
            bar.update(count, f"loss {metrics['loss']:.4g}")
            if is_main and done > last_logged("loss"):
                job.run.metrics(metrics, step=done)
        if is_main and validation is not None and validation.is_sheet_due(done) and done > last_logged("loss"):
            job.run.image("samples", validation.draw_sheet(learner.averaged()), step=done)
        is_validated = validation is not None and validation.is_due(done)
        if is_main and validation is not None and is_validated:
            began = time.perf_counter()
            validated = validation.measure(learner.averaged())
            if new := {name: value for name, value in validated.items() if done > last_logged(name)}:
                job.run.metrics(new, step=done)
            window.started += time.perf_counter() - began  # the training speed excludes validation
        is_saved = checkpoints.is_due(done) or is_last
        if is_saved or is_validated:
            loss, began = sum(_losses(job, latest, done).values()), checkpoints.clock()
            if is_saved:
                if is_main:
                    claims.check(job.out, job.claim)
                    job.run.flush()  # a run resumed from this checkpoint does not log these metrics again
                state = _save(learner, done, validated)
            report({"update": float(done), "loss": loss, **validated}, state if is_saved else None)
            if is_saved:
                checkpoints.saved(done, began)
    bar.close()
    return state or _save(learner, first, validated)


def averaged_weights(state: bytes) -> dict[str, Tensor]:
    """The averaged weights in a training state, which become the model."""
    return _load(state)["learner"][AVERAGE]  # type: ignore[no-any-return]


class _Window:
    """The updates since metrics were last logged, on all workers."""

    def __init__(self, job: Job, worker: Worker) -> None:
        self.job, self.worker = job, worker
        self.updates: list[LossTerms] = []
        self.started = time.perf_counter()

    def close(self, done: int) -> dict[str, float]:
        """Return the metrics of the window and start a new one after update ``done``."""
        losses, options = _losses(self.job, self.updates, done), self.job.task.optimizer
        metrics = {
            "loss": sum(losses.values()),
            **{f"{PART_PREFIX}{name}": mean for name, mean in losses.items()},
            **_means([update.diagnostics for update in self.updates]),
            "learning_rate": learning_rate(done - 1, options),
            "samples_per_second": len(self.updates) * options.batch_size / (time.perf_counter() - self.started),
            "peak_memory_bytes": float(peak_bytes(self.worker.device)),
        }
        self.updates, self.started = [], time.perf_counter()
        return metrics


def _losses(job: Job, updates: list[LossTerms], done: int) -> dict[str, float]:
    """The mean of each part of the loss. Raises ``DivergedError`` if their sum is not finite."""
    losses = _means([update.losses for update in updates])
    if not math.isfinite(loss := sum(losses.values())):
        raise DivergedError(f"{job.out}: the loss is {loss} at update {done}. Lower `optimizer.learning_rate`.")
    return losses


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
