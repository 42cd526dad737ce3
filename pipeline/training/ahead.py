"""Batches made ahead on a thread, so that the device waits neither for the data nor for their way to it."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pipeline.training.learner import MicroBatch

BATCHES_AHEAD = 2

Batch = TypeVar("Batch", bound=tuple[Any, ...])
"""A named tuple of tensors."""


def made_ahead(make: Callable[[MicroBatch], Batch], device: torch.device) -> Callable[[MicroBatch], Batch]:
    """What makes a worker's batches on its device: ahead where that is a GPU.

    On the CPU a second thread would only take the cores of the first: a small network trained at half its speed.
    """
    return Ahead(make) if device.type == "cuda" else make


class Ahead(Generic[Batch]):
    """What ``make`` makes of a worker's micro-batches in their order, from the first that is asked for.

    An error of ``make`` is raised where its batch is asked for. The thread ends with the last reference to this.

    Args:
        make: of a micro-batch its batch on the CPU; called on one thread, and for batches after the last one too.
    """

    def __init__(self, make: Callable[[MicroBatch], Batch]) -> None:
        self.make = make
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.begun: deque[tuple[MicroBatch, Future[Batch]]] = deque()

    def __call__(self, micro: MicroBatch) -> Batch:
        """The batch of a micro-batch, on its worker's device."""
        if not self.begun or self.begun[0][0] != micro:
            self._begin(micro)
        _, batch = self.begun.popleft()
        self._add(self.begun[-1][0].next())
        return on_device(batch.result(), micro.worker.device)

    def _begin(self, first: MicroBatch) -> None:
        for _, batch in self.begun:
            batch.cancel()
        self.begun.clear()
        for _ in range(BATCHES_AHEAD):
            self._add(first)
            first = first.next()

    def _add(self, micro: MicroBatch) -> None:
        self.begun.append((micro, self.thread.submit(self._make, micro)))

    def _make(self, micro: MicroBatch) -> Batch:
        return pinned(self.make(micro), micro.worker.device)


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch in memory from which a GPU copies by itself; unchanged where ``device`` is none."""
    return _each(batch, Tensor.pin_memory) if device.type == "cuda" else batch


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; of pinned memory nobody waits for the copy."""
    return _each(batch, lambda part: part.to(device, non_blocking=True))


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    return type(batch)(*(change(part) for part in batch))
