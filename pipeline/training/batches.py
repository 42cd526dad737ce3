"""Training batches: how workers split them, their order, their random numbers, and prefetching."""

import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kac.util.device import to_device

BATCHES_AHEAD = 2


class Worker(NamedTuple):
    """A process that runs one copy of the training loop."""

    rank: int
    world_size: int
    device: torch.device
    max_workers: int | None = None  # maximum number of workers, if their number can change

    @property
    def seats(self) -> int:
        """The number of workers that a batch is split for. If fewer are running, a worker may fill several seats."""
        return self.max_workers or self.world_size


class MicroBatch(NamedTuple):
    """One part of an update's batch, which a worker processes in one pass.

    The batch has a fixed number of slots: ``accumulation`` slots per seat, ordered by seat. If there are fewer workers
    than seats, the workers share the slots as evenly as possible. Random numbers depend on the slot and not on the
    worker, so one worker with two micro-batches per update gives the same result as two workers with one each.
    """

    update: int
    number: int  # index among its worker's passes, from 0 to passes - 1
    accumulation: int
    worker: Worker

    @property
    def slots(self) -> int:
        """The number of parts into which the update's batch is split."""
        return self.worker.seats * self.accumulation

    @property
    def slot(self) -> int:
        """The index of this part in the batch."""
        return self._slots_of_worker.start + self.number

    @property
    def seat(self) -> int:
        """The rank of the worker that would process this part if each seat had its own worker."""
        return self.slot // self.accumulation

    @property
    def passes(self) -> int:
        """The number of micro-batches that this worker processes per update."""
        return len(self._slots_of_worker)

    @property
    def _slots_of_worker(self) -> range:
        rank, size = self.worker.rank, self.worker.world_size
        return range(rank * self.slots // size, (rank + 1) * self.slots // size)

    def next(self) -> "MicroBatch":
        """The micro-batch that this worker processes next."""
        update, number = divmod(self.number + 1, self.passes)
        return self._replace(update=self.update + update, number=number)

    def share(self, rows: Tensor) -> Tensor:
        """Return this part's rows of a whole batch: [batch, ...] to [batch / slots, ...]."""
        return rows[self.slot :: self.slots]


class EpochOrder:
    """Endless shuffled epochs over ``count`` rows, split into batches. Caches the order of the last two epochs."""

    def __init__(self, seed: int, count: int, batch_size: int) -> None:
        self.seed, self.count, self.batch_size = seed, count, batch_size
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def batch(self, update: int) -> Tensor:
        """The row numbers of an update's batch: [batch_size], int64."""
        first, last = update * self.batch_size, (update + 1) * self.batch_size
        epochs = range(first // self.count, (last - 1) // self.count + 1)
        return torch.cat([self._epoch(n)[max(0, first - n * self.count) : last - n * self.count] for n in epochs])

    def _shuffle(self, epoch: int) -> Tensor:
        return torch.randperm(self.count, generator=_seeded(ORDER_STREAM, self.seed, epoch))


# Random numbers depend only on (seed, update, slot), so checkpoints need no random state.
ORDER_STREAM, UPDATE_STREAM, SLOT_STREAM, DROPOUT_STREAM = 1, 2, 3, 4


def update_generator(seed: int, update: int) -> torch.Generator:
    """A CPU generator for the random numbers of an update's whole batch. Every worker gets the same numbers."""
    return _seeded(UPDATE_STREAM, seed, update)


def slot_generator(seed: int, micro: MicroBatch) -> torch.Generator:
    """A generator for one micro-batch, on its worker's device."""
    number = _seeded(SLOT_STREAM, seed, micro.update, micro.slot).initial_seed()
    return torch.Generator(micro.worker.device).manual_seed(number)


def seed_dropout(seed: int, micro: MicroBatch) -> None:
    """Seed PyTorch's global generators, which dropout uses, for a micro-batch."""
    torch.manual_seed(_seeded(DROPOUT_STREAM, seed, micro.update, micro.slot).initial_seed())


def _seeded(*key: int) -> torch.Generator:
    """A CPU generator seeded with all the numbers in ``key``. The first is one of the stream numbers above."""
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


MakeBatch = Callable[[MicroBatch], tuple[Tensor, ...]]
"""A function that returns a micro-batch's tensors."""


def prefetched(make: MakeBatch, device: torch.device) -> MakeBatch:
    """Return ``make``, with prefetching if ``device`` is a GPU.

    On a CPU, the thread would compete with training for cores. In a measurement, prefetching halved the training speed
    of a small network.
    """
    return Prefetcher(make) if device.type == "cuda" else make


class Prefetcher:
    """Makes a worker's micro-batches on a thread, in order, starting with the first micro-batch requested.

    An error in ``make`` is raised when its batch is requested. The thread ends when the prefetcher is deleted.
    """

    def __init__(self, make: MakeBatch) -> None:
        self.make = make
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.queue: deque[Future[tuple[Tensor, ...]]] = deque()

    def __call__(self, micro: MicroBatch) -> tuple[Tensor, ...]:
        """Return the next micro-batch on its worker's device."""
        if not self.queue:
            self.following = micro
        while len(self.queue) <= BATCHES_AHEAD:
            self.queue.append(self.thread.submit(self._make_on_device, self.following))
            self.following = self.following.next()
        return self.queue.popleft().result()

    def _make_on_device(self, micro: MicroBatch) -> tuple[Tensor, ...]:
        return tuple(to_device(values, micro.worker.device) for values in self.make(micro))
