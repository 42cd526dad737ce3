"""The training loop: updates, metrics, checkpoints and a progress bar. It does not depend on where it runs.

An update depends only on (task, update, rank, world size), so a resumed run gives the same result as an
uninterrupted run. Logged metrics are means over all workers.
"""

import functools
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kac.losses import LossTerms
from kac.metrics import Metric
from kac.util.errors import DistillKacError, DivergedError
from pipeline import claims
from pipeline.memory import peak_bytes
from pipeline.progress import ProgressBar
from pipeline.tracking import PART_PREFIX, TrackedRun, declare
from pipeline.training.batches import Worker
from pipeline.training.learner import AVERAGE, GUIDE, Learner, learning_rate
from pipeline.training.validation import Validation

LOG_UPDATES = 50

MAX_SAVING_SHARE = 0.05
"""Saving takes at most this share of the training time, unless it takes less than ``FREE_SECONDS`` per checkpoint."""

FREE_SECONDS = 1.0

DECISION_SECONDS = 1.0
"""Time between two decisions whether to save a checkpoint. It is longer if a single update takes longer."""

declare(
    Metric("loss", "training loss, averaged over the updates since the previous point", better="lower"),
    Metric("learning_rate", "learning rate of the last update"),
    Metric("gradient_norm", "gradient norm before clipping, averaged over the updates since the previous point"),
    Metric("samples_per_second", "training samples per second", better="higher"),
    Metric("peak_memory_bytes", "peak memory so far: of tensors on a GPU, or of the process on a CPU", better="lower"),
)

Report = Callable[[dict[str, float], bytes | None], None]
"""(metrics, training state): called on every worker after each validation and each checkpoint.

The metrics are ``update``, ``loss`` and, only on rank 0, the metrics of the last validation. The state is None unless a
checkpoint is due.
"""


class Task(Protocol):
    """What to train. A task is pickled and sent to the workers."""

    def build(self, worker: Worker) -> Learner:
        """Return one worker's learner, with initial weights."""
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


def run_updates(
    job: Job, worker: Worker, report: Report, resume: bytes | None, must_save: Callable[[], bool] = lambda: False
) -> bytes:
    """Train from the state ``resume``, or from the start, to the last update. Return the final state.

    Args:
        must_save: whether to save a checkpoint now. All workers call it together, about once per second, and must get
            the same answer.

    Raises:
        DivergedError: the loss is not finite.
        DistillKacError: another job has taken over the folder, or a batch does not fit into the GPU's memory.
    """
    learner, is_main, validation = job.task.build(worker), worker.rank == 0, job.validation
    total = learner.options.updates
    first, validated = 0, dict[str, float]()
    if resume is not None:
        saved = _load(resume)
        learner.load_state_dict(saved["learner"])
        first, validated = int(saved["update"]), saved.get("validated", {})
    bar = ProgressBar(job.title, total, "updates", first, is_shown=is_main)
    # A resumed run repeats the updates since its checkpoint. The metrics of these updates are already logged.
    last_logged = functools.cache(job.run.last_step)
    checkpoints = CheckpointSchedule(
        job.checkpoint_updates, job.checkpoint_seconds, worker.device, first, must_save=must_save
    )
    state, since_log, started = resume, list[LossTerms](), time.perf_counter()
    for done in range(first + 1, total + 1):
        latest = _update(job, learner, done - 1)
        since_log.append(latest)
        is_last = done == total
        if done % LOG_UPDATES == 0 or is_last:
            metrics = _metrics(job, learner, since_log, done, time.perf_counter() - started)
            bar.update(len(since_log), f"loss {metrics['loss']:.4g}")
            since_log, started = [], time.perf_counter()
            if is_main and done > last_logged("loss"):
                job.run.metrics(metrics, step=done)
        is_validated = validation is not None and validation.is_due(done)
        if is_main and validation is not None:
            began = time.perf_counter()
            if done % (validation.sheet_updates or total + 1) == 0 and done > last_logged("loss"):
                job.run.image("samples", validation.draw_sheet(learner.averaged()), step=done)
            if is_validated:
                validated = validation.measure(learner.averaged())
                if new := {name: value for name, value in validated.items() if done > last_logged(name)}:
                    job.run.metrics(new, step=done)
            started += time.perf_counter() - began  # the training speed excludes sheets and validations
        is_saved = is_last or checkpoints.is_due(done)
        if is_saved or is_validated:
            loss, began = sum(_losses(job, [latest], done).values()), checkpoints.clock()
            if is_saved:
                if is_main:
                    claims.check(job.out, job.claim)
                    job.run.flush()  # a run resumed from this checkpoint does not log these metrics again
                sink = io.BytesIO()
                torch.save({"update": done, "learner": learner.state_dict(), "validated": validated}, sink)
                state = sink.getvalue()
            report({"update": float(done), "loss": loss, **validated}, state if is_saved else None)
            if is_saved:
                checkpoints.saved(began)
    bar.close()
    assert state is not None
    return state


def _update(job: Job, learner: Learner, number: int) -> LossTerms:
    try:
        return learner.update(number)
    except torch.OutOfMemoryError as error:  # another try would fail in the same way
        raise DistillKacError(
            f"{job.out}: a batch does not fit into the GPU's memory. Raise `optimizer.accumulation` or `workers`, so "
            "that each pass has fewer samples."
        ) from error


def averaged_weights(state: bytes) -> dict[str, Tensor]:
    """The averaged weights in a training state, with those of a guide. They become the model's weights."""
    learner = _load(state)["learner"]
    return {**learner[AVERAGE], **learner.get(GUIDE, {})}


class CheckpointSchedule:
    """Decides when a checkpoint is due: every ``updates`` updates, and ``seconds`` after the last checkpoint.

    A checkpoint is also due when ``must_save`` returns True.

    All workers make the same calls and must save after the same update, but their clocks differ. Rank 0 therefore
    decides for all workers. It broadcasts its decision only about once per second, because each broadcast makes the
    workers wait.
    """

    def __init__(
        self,
        updates: int,
        seconds: float,
        device: torch.device,
        first: int,
        clock: Callable[[], float] = time.monotonic,
        must_save: Callable[[], bool] = lambda: False,
    ) -> None:
        self.updates, self.seconds, self.device, self.clock = updates, seconds, device, clock
        self.must_save = must_save
        self._next, self._decided, self._pause = first + 1, first, 0.0
        self._decided_at = self._saved_at = clock()

    def is_due(self, done: int) -> bool:
        """Whether to save a checkpoint after update ``done``."""
        if done < self._next and done % self.updates:
            return False
        now = self.clock()
        per_update = max(now - self._decided_at, 1e-9) / (done - self._decided)
        wait = self._pause if done % self.updates == 0 else max(self._pause, self.seconds)
        until_next = min(LOG_UPDATES, max(1, int(DECISION_SECONDS / per_update)))
        message = torch.tensor([int(now - self._saved_at >= wait), until_next])
        if dist.is_initialized():
            message = message.to(self.device)
            dist.broadcast(message, src=0)
        is_due, until_next = message.tolist()
        self._next, self._decided, self._decided_at = done + until_next, done, now
        return self.must_save() or bool(is_due)

    def saved(self, began: float) -> None:
        """Record that a checkpoint has been saved, and that saving began at time ``began``."""
        self._saved_at = self._decided_at = self.clock()
        seconds = self._saved_at - began
        self._pause = seconds / MAX_SAVING_SHARE if seconds >= FREE_SECONDS else 0.0


def _metrics(job: Job, learner: Learner, updates: list[LossTerms], done: int, seconds: float) -> dict[str, float]:
    """The metrics of ``updates``, the updates since metrics were last logged, which took ``seconds``."""
    losses, options = _losses(job, updates, done), learner.options
    return {
        "loss": sum(losses.values()),
        **{f"{PART_PREFIX}{name}": mean for name, mean in losses.items()},
        **_means([update.diagnostics for update in updates]),
        "learning_rate": learning_rate(done - 1, options),
        "samples_per_second": len(updates) * options.batch_size / seconds,
        "peak_memory_bytes": float(peak_bytes(learner.worker.device)),
    }


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


def newest(states: Sequence[bytes]) -> bytes | None:
    """Return the training state after the most updates, or None without a state."""
    if len(states) < 2:  # do not load a single state, which may be large
        return states[0] if states else None
    return max(states, key=lambda state: int(_load(state)["update"]))


def _load(data: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state
