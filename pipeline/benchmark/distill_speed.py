"""Distillation from the store, loaded once or streamed, compared with the same loop over tensors in memory."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kac.losses import Interval
from kac.solvers import knot_times
from kac.util import files
from kac.util.device import default_device
from pipeline import training
from pipeline.benchmark.measurement import Bar, Measurement, interleave, one_thread
from pipeline.benchmark.setting import STUDENT_STEPS, Setting
from pipeline.config import DistillSpec, OptimizerConfig
from pipeline.distill import DistillTask
from pipeline.tracking import TrackedRun
from pipeline.training.loop import LOG_UPDATES, run_updates

UNIT = "samples/s"
LOADED_BAR, STREAMED_BAR = Bar(">=", 0.95), Bar(">=", 0.6)
STREAMED_FACTOR = 4
"""Ratio of the size of the streamed store to its memory budget."""


def measure(setting: Setting) -> list[Measurement]:
    """Compare the store loaded once, and the store streamed by Ray Data, with tensors in memory."""
    source = setting.store()
    every = source.identity.knots // STUDENT_STEPS
    whole = next(source.batches(source.rows(0.0), knots=range(0, source.identity.knots + 1, every)))
    updates = updates_of(setting, len(whole.label))
    batch = tensor_batches(whole.knots, whole.label, setting.spec.batch_size)
    with one_thread():
        tensors, loaded, streamed = interleave(
            setting.spec.repeats,
            lambda: speed(setting, updates, batch=batch),
            lambda: speed(setting, updates),
            lambda: speed(setting, updates, memory_gib=whole.knots.nbytes / STREAMED_FACTOR / 2**30),
        )
    return [
        Measurement("store, loaded once / tensors in memory", UNIT, loaded, tensors, LOADED_BAR),
        Measurement("store, streamed / tensors in memory", UNIT, streamed, tensors, STREAMED_BAR),
    ]


def updates_of(setting: Setting, rows: int) -> int:
    """The number of updates: one window of the loop to warm up, then at least one epoch of ``rows``."""
    epoch = rows / setting.spec.batch_size
    return LOG_UPDATES * (1 + math.ceil(epoch / LOG_UPDATES))


def tensor_batches(knots: Tensor, label: Tensor, size: int) -> Callable[[int], Interval]:
    """Return a function that draws random intervals of random rows, like a loop without a store.

    Args:
        knots: [rows, STUDENT_STEPS + 1, *sample].
        label: [rows].
        size: rows per batch.
    """
    times, device = knot_times(STUDENT_STEPS).float(), default_device()

    def batch(update: int) -> Interval:
        row, k = torch.randint(len(label), (size,)), torch.randint(STUDENT_STEPS, (size,))
        parts = (knots[row, k], knots[row, k + 1], times[k], times[k + 1], label[row], torch.zeros(size))
        return Interval(*(part.to(device) for part in parts))

    return batch


def distill_task(
    setting: Setting, updates: int, memory_gib: float = 4.0, batch: Callable[[int], Interval] | None = None
) -> DistillTask:
    """The task of ``jobs.distill``; ``batch`` replaces the batches from the store."""
    optimizer = OptimizerConfig(updates=updates, batch_size=setting.spec.batch_size)
    place = {"store": setting.rollout_spec("store").store, "out": files.join(setting.folder, "student")}
    spec = DistillSpec(**place, steps=STUDENT_STEPS, optimizer=optimizer, memory_gib=memory_gib)
    return DistillTask(spec, setting.teacher, batch)


@dataclass(frozen=True)
class SpeedRecorder(TrackedRun):
    """Replaces an MLflow run. Keeps the speed that the loop logs for each window of ``LOG_UPDATES`` updates."""

    speeds: list[float] = field(default_factory=list)

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Keep the logged speed."""
        self.speeds.append(values["samples_per_second"])


def speed(setting: Setting, updates: int, **options: Any) -> float:
    """Samples per second of the training loop in this process, without the first window, which loads the rows."""
    run, task = SpeedRecorder("", ""), distill_task(setting, updates, **options)
    job = training.Job(task, "benchmark", "", run, checkpoint_updates=updates)
    run_updates(job, training.Worker(0, 1, default_device()), lambda metrics, state: None, None)
    return statistics.harmonic_mean(run.speeds[1:] or run.speeds)
