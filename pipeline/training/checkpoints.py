"""When the training loop saves a checkpoint: after a number of updates, and after some time if updates are slow.

All workers must save after the same update, but their clocks differ. So the worker of rank 0 reads its clock and
broadcasts the update after which the next checkpoint is due. It does so when metrics are logged, so that no other
update waits for communication.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from pipeline.training.batches import Worker

MAX_SAVING_SHARE = 0.05
"""Saving takes at most this share of the training time, unless it takes less than ``FREE_SECONDS`` per checkpoint."""

FREE_SECONDS = 1.0

NEVER = 2**62


class CheckpointSchedule:
    """Decides when a checkpoint is due. Every worker must make the same calls in the same order.

    Args:
        updates: save after every ``updates`` updates.
        seconds: also save when ``seconds`` have passed since the last checkpoint.
        first: number of updates done before this process started.
        every: updates between two broadcasts. The first ones come earlier: after 1, 2, 4, ... updates.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        updates: int,
        seconds: float,
        worker: Worker,
        first: int,
        every: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.updates, self.seconds, self.worker = updates, seconds, worker
        self.first, self.every, self.clock = first, every, clock
        self._due, self._not_before = NEVER, 0  # update numbers, as last broadcast
        self._is_new = False  # whether the duration of the last checkpoint has not been broadcast yet
        self._saving_seconds = 0.0  # duration of the last checkpoint
        self._saved_at = self._broadcast_at = clock()  # times of the last checkpoint and of the last broadcast
        self._broadcast_update = first

    def is_due(self, done: int) -> bool:
        """Whether to save a checkpoint after update ``done``."""
        since = done - self.first
        is_early = since < self.every and since & (since - 1) == 0
        if self._is_new or is_early or done % self.every == 0:
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
            message = torch.tensor(schedule, device=self.worker.device)
            dist.broadcast(message, src=0)
            schedule = message.tolist()
        self._due, self._not_before = schedule
