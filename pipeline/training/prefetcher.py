"""Prefetching: a thread prepares the next batches, so that the GPU waits neither for data nor for copies."""

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


def prefetched(make: Callable[[MicroBatch], Batch], device: torch.device) -> Callable[[MicroBatch], Batch]:
    """Return ``make``, with prefetching if ``device`` is a GPU.

    On the CPU the thread would compete with training for cores: it halved the training speed of a small network.
    """
    return Prefetcher(make) if device.type == "cuda" else make


class Prefetcher(Generic[Batch]):
    """Prepares a worker's micro-batches in order, starting with the first one requested.

    An error in ``make`` is raised when its batch is requested. The thread ends when the prefetcher is deleted.

    Args:
        make: makes the batch of a micro-batch on the CPU. Called on one thread, also for batches after the last one.
    """

    def __init__(self, make: Callable[[MicroBatch], Batch]) -> None:
        self.make = make
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.queue: deque[tuple[MicroBatch, Future[Batch]]] = deque()

    def __call__(self, micro: MicroBatch) -> Batch:
        """Return the data of a micro-batch, on its worker's device."""
        if not self.queue or self.queue[0][0] != micro:
            self._restart(micro)
        _, batch = self.queue.popleft()
        self._submit(self.queue[-1][0].next())
        return on_device(batch.result(), micro.worker.device)

    def _restart(self, first: MicroBatch) -> None:
        for _, batch in self.queue:
            batch.cancel()
        self.queue.clear()
        for _ in range(BATCHES_AHEAD):
            self._submit(first)
            first = first.next()

    def _submit(self, micro: MicroBatch) -> None:
        self.queue.append((micro, self.thread.submit(self._make_pinned, micro)))

    def _make_pinned(self, micro: MicroBatch) -> Batch:
        return pinned(self.make(micro), micro.worker.device)


def pinned(batch: Batch, device: torch.device) -> Batch:
    """Return the batch in pinned memory if ``device`` is a GPU, else unchanged."""
    return _map_tensors(Tensor.pin_memory, batch) if device.type == "cuda" else batch


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on ``device``. Copies from pinned memory are asynchronous."""
    return _map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def _map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    return type(batch)(*(function(tensor) for tensor in batch))
