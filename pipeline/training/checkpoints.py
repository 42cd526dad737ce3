"""When the loop saves: by updates, and by time where updates are slow.

All workers must save at the same update, and clocks differ. The worker of rank 0 looks at its own and says at which
update the next checkpoint is due; the others hear of it when metrics are logged, so no update waits for a message.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from pipeline.training.learner import Worker

MOST_SHARE = 0.05
"""Of the time of a training that goes into checkpoints, where one takes ``FREE_SECONDS`` or more."""

FREE_SECONDS = 1.0

NEVER = 2**62


class Checkpoints:
    """When a checkpoint is due. Every worker asks the same questions in the same order.

    Args:
        updates: one is due every so many. seconds: and when so many have passed since the last.
        first: how many updates are done already.
        every: updates between two agreements; before the first they come at 1, 2, 4, ...
        clock: in seconds.
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
        self._due, self._not_before = NEVER, 0  # updates, as agreed
        self._is_new = False  # a checkpoint has just been taken: how long it took is not agreed yet
        self._took = 0.0  # seconds, of the last checkpoint
        self._saved = self._seen = clock()  # when the last checkpoint, and the last agreement, was
        self._seen_update = first

    def is_due(self, done: int) -> bool:
        """Whether to save after this update."""
        if self._is_new or self._is_agreed_at(done):
            self._agree(done)
        by_updates = done % self.updates == 0 and done >= self._not_before
        return by_updates or done >= self._due

    def saved(self, done: int, began: float) -> None:
        """A checkpoint of this update, begun at ``began`` of the clock, is saved."""
        self._saved = self._seen = self.clock()
        self._took, self._seen_update = self._saved - began, done
        self._is_new = True

    def _is_agreed_at(self, done: int) -> bool:
        since = done - self.first
        return done % self.every == 0 or (since < self.every and since & (since - 1) == 0)

    def _agree(self, done: int) -> None:
        now = self.clock()
        an_update = max(now - self._seen, 1e-9) / max(1, done - self._seen_update)
        self._seen, self._seen_update = now, done
        pause = self._took / MOST_SHARE if self._took >= FREE_SECONDS else 0.0
        left = [(seconds - (now - self._saved)) / an_update for seconds in (max(self.seconds, pause), pause)]
        wanted = [done + math.ceil(min(max(0.0, updates), NEVER / 2)) for updates in left]
        if dist.is_initialized():
            agreed = torch.tensor(wanted, device=self.worker.device)
            dist.broadcast(agreed, src=0)
            wanted = agreed.tolist()
        self._due, self._not_before = wanted
        self._is_new = False
