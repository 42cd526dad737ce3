"""The training loop: updates, metrics, checkpoints and a progress bar, independent of where it runs.

An update depends only on (task, update, rank, world size), so a resumed run gives the same result as an
uninterrupted one. Logged metrics are means over all workers.

All workers must save after the same update, but their clocks differ. So the worker of rank 0 reads its clock and
broadcasts the update after which the next checkpoint is due. It does so when metrics are logged, so that no other
update waits for communication.
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
from pipeline.memory import peak_bytes
from pipeline.progress import ProgressBar
from pipeline.tracking import PART_PREFIX, TrackedRun, declare
from pipeline.training.batches import Worker
from pipeline.training.learner import AVERAGE, Learner, learning_rate
from pipeline.training.validation import Validation

LOG_UPDATES = 50

MAX_SAVING_SHARE = 0.05
"""Saving takes at most this share of the training time, unless it takes less than ``FREE_SECONDS`` per checkpoint."""

FREE_SECONDS = 1.0

NEVER = 2**62

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
    learner, is_main, validation = job.task.build(worker), worker.rank == 0, job.validation
    total = learner.options.updates
    first, validated = _restore(learner, resume)
    window = _Window(job, learner)
    bar = ProgressBar(job.title, total, "updates", first, is_shown=is_main)
    # A resumed run repeats the updates since its checkpoint. Their metrics are already logged.
    last_logged = functools.cache(job.run.last_step)
    checkpoints = CheckpointSchedule(job.checkpoint_updates, job.checkpoint_seconds, worker.device, first)
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


class CheckpointSchedule:
    """Decides when a checkpoint is due. Every worker must make the same calls in the same order.

    Args:
        updates: save after every ``updates`` updates.
        seconds: also save when ``seconds`` have passed since the last checkpoint.
        device: device of the messages to other workers.
        first: number of updates done before this process started.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        updates: int,
        seconds: float,
        device: torch.device,
        first: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.updates, self.seconds, self.device, self.first, self.clock = updates, seconds, device, first, clock
        self._due, self._not_before = NEVER, 0  # update numbers, as last broadcast
        self._is_new = False  # whether the duration of the last checkpoint has not been broadcast yet
        self._saving_seconds = 0.0  # duration of the last checkpoint
        self._saved_at = self._broadcast_at = clock()  # times of the last checkpoint and of the last broadcast
        self._broadcast_update = first

    def is_due(self, done: int) -> bool:
        """Whether to save a checkpoint after update ``done``."""
        since = done - self.first
        is_early = since < LOG_UPDATES and since & (since - 1) == 0  # 1, 2, 4, ...
        if self._is_new or is_early or done % LOG_UPDATES == 0:
            self._broadcast(done)
        return done >= self._due or (done % self.updates == 0 and done >= self._not_before)

    def saved(self, done: int, began: float) -> None:
        """Record that a checkpoint of update ``done`` has been saved; saving began at time ``began``."""
        self._saved_at = self._broadcast_at = self.clock()
        self._saving_seconds, self._broadcast_update, self._is_new = self._saved_at - began, done, True

    def _broadcast(self, done: int) -> None:
        now = self.clock()
        seconds_per_update = max(now - self._broadcast_at, 1e-9) / max(1, done - self._broadcast_update)
        self._broadcast_at, self._broadcast_update, self._is_new = now, done, False
        pause = self._saving_seconds / MAX_SAVING_SHARE if self._saving_seconds >= FREE_SECONDS else 0.0
        schedule = []
        for interval in (max(self.seconds, pause), pause):
            updates_left = (interval - (now - self._saved_at)) / seconds_per_update
            schedule.append(done + math.ceil(min(max(0.0, updates_left), NEVER / 2)))
        if dist.is_initialized():
            message = torch.tensor(schedule, device=self.device)
            dist.broadcast(message, src=0)
            schedule = message.tolist()
        self._due, self._not_before = schedule


class _Window:
    """The updates since metrics were last logged, on all workers."""

    def __init__(self, job: Job, learner: Learner) -> None:
        self.job, self.learner = job, learner
        self.updates: list[LossTerms] = []
        self.started = time.perf_counter()

    def close(self, done: int) -> dict[str, float]:
        """Return the metrics of the window and start a new one after update ``done``."""
        losses, options = _losses(self.job, self.updates, done), self.learner.options
        metrics = {
            "loss": sum(losses.values()),
            **{f"{PART_PREFIX}{name}": mean for name, mean in losses.items()},
            **_means([update.diagnostics for update in self.updates]),
            "learning_rate": learning_rate(done - 1, options),
            "samples_per_second": len(self.updates) * options.batch_size / (time.perf_counter() - self.started),
            "peak_memory_bytes": float(peak_bytes(self.learner.worker.device)),
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
