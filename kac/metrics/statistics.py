"""What is kept of features that stream by, so that any number of samples is judged in bounded memory."""

from functools import cached_property

import safetensors.torch
import torch
from torch import Tensor

KEPT_ROWS = 10_000
"""The first rows of each set are kept for what needs the features themselves: nearest neighbours, kernels, slices."""

MAX_BLOCKS = 10
"""A Frechet distance at a smaller count is the mean over at most so many disjoint blocks of rows."""


class Moments:
    """Count, mean [width] and covariance [width, width] (of n - 1) of rows, in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Count rows [rows, width] in."""
        rows = rows.double()
        total, mean = self.count + len(rows), rows.mean(0)
        centred, gap = rows - mean, mean - self.mean
        # Chan, Golub, LeVeque: the scatter about the common mean.
        self._scatter += centred.T @ centred + torch.outer(gap, gap) * (self.count * len(rows) / total)
        self.mean, self.count = self.mean + gap * (len(rows) / total), total

    @property
    def covariance(self) -> Tensor:
        """[width, width]; of at least two rows."""
        return self._scatter / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric root of the covariance, once all rows are in."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        return root


class Statistics:
    """The moments of all rows, the first ``KEPT_ROWS`` of them, and the moments of the first blocks.

    Args:
        block: rows a block; 0: none.
    """

    def __init__(self, width: int, block: int = 0) -> None:
        self.moments, self.block = Moments(width), block
        self.blocks: list[Moments] = []
        self._kept: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Count the features [rows, width] in."""
        missing = KEPT_ROWS - self.moments.count
        if missing > 0:
            self._kept.append(rows[:missing].float())
        self._fill_blocks(rows)
        self.moments.add(rows)

    @property
    def width(self) -> int:
        """Features per row."""
        return len(self.moments.mean)

    @cached_property
    def kept(self) -> Tensor:
        """[rows, width] float32, once all rows are in."""
        return torch.cat(self._kept)

    def _fill_blocks(self, rows: Tensor) -> None:
        start, place = 0, self.moments.count
        while self.block and start < len(rows) and place < MAX_BLOCKS * self.block:
            if place % self.block == 0:
                self.blocks.append(Moments(rows.shape[1]))
            stop = start + min(self.block - place % self.block, len(rows) - start)
            self.blocks[-1].add(rows[start:stop])
            start, place = stop, place + stop - start

    def full_blocks(self) -> list[Moments]:
        """The blocks that have all their rows."""
        return [block for block in self.blocks if block.count == self.block]

    def to_bytes(self) -> bytes:
        """Everything but the blocks, for a cache."""
        moments = self.moments
        tensors = {"mean": moments.mean, "scatter": moments._scatter, "kept": self.kept}
        return safetensors.torch.save(tensors, metadata={"count": str(moments.count)})

    @staticmethod
    def from_bytes(data: bytes, count: int) -> "Statistics":
        """What ``to_bytes`` made of ``count`` rows."""
        tensors = safetensors.torch.load(data)
        made = Statistics(len(tensors["mean"]))
        made.moments.count, made.moments.mean = count, tensors["mean"]
        made.moments._scatter, made._kept = tensors["scatter"], [tensors["kept"]]
        return made
