"""Random numbers of training: functions of (seed, update, rank) alone, so that no random state needs to be saved."""

import numpy as np
import torch
from torch import Tensor

from pipeline.training.learner import Worker


def seeded(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on the whole ``key``."""
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def generator(seed: int, update: int, worker: Worker) -> torch.Generator:
    """The random numbers of one worker's update, on its device."""
    on_cpu = seeded(seed, update, worker.rank)
    if worker.device.type == "cpu":
        return on_cpu
    return torch.Generator(worker.device).manual_seed(on_cpu.initial_seed())


class EpochOrder:
    """Endless shuffled epochs over ``count`` rows, cut into batches; an epoch is shuffled once, when it begins."""

    def __init__(self, seed: int, count: int, batch_size: int) -> None:
        self.seed, self.count, self.batch_size = seed, count, batch_size
        self._shuffled: dict[int, Tensor] = {}

    def batch(self, update: int) -> Tensor:
        """The rows of an update's batch: [batch_size], int64."""
        first, last = update * self.batch_size, (update + 1) * self.batch_size
        epochs = range(first // self.count, (last - 1) // self.count + 1)
        known = self._shuffled
        self._shuffled = {epoch: known[epoch] if epoch in known else self._shuffle(epoch) for epoch in epochs}
        order = torch.cat(list(self._shuffled.values())) if len(epochs) > 1 else self._shuffled[epochs.start]
        return order[first - epochs.start * self.count :][: self.batch_size]

    def _shuffle(self, epoch: int) -> Tensor:
        return torch.randperm(self.count, generator=seeded(self.seed, epoch))
