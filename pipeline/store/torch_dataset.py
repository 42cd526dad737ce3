"""A store as a PyTorch dataset."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipeline.store.batches import Batch


class EndpointDataset(torch.utils.data.IterableDataset[Batch]):
    """A store's batches for a PyTorch ``DataLoader`` (give it ``batch_size=None``).

    The loader's worker processes share the rows of this rank between them. ``set_epoch`` changes the shuffle.
    """

    def __init__(self, batches: Callable[..., Iterator[Batch]], options: dict[str, Any]) -> None:
        self.batches, self.options, self.epoch = batches, options, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        options = {"epoch": self.epoch, "rank": 0, "world_size": 1, **self.options}
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            options["rank"] = options["rank"] * worker.num_workers + worker.id
            options["world_size"] *= worker.num_workers
        return self.batches(**options)
