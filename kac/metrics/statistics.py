"""Statistics of streamed features. Their memory use does not grow with the number of samples."""

from collections.abc import Iterable
from functools import cached_property

import safetensors.torch
import torch
from torch import Tensor

KEPT_ROWS = 10_000
"""The number of rows kept for metrics that need the features themselves: precision, recall, KID and sliced W2."""

NEIGHBOURS = 3
"""Precision and recall use the distance to the nearest neighbour of this rank."""

MAX_BLOCKS = 10
"""A Frechet distance at a smaller sample count is averaged over at most this many disjoint blocks of samples."""


class Moments:
    """The count, mean [width] and unbiased covariance [width, width] of rows, in float64.

    Example:
        >>> moments = Moments(width=2)
        >>> moments.add(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
        >>> moments.count, moments.mean.tolist(), moments.covariance.tolist()
        (2, [1.0, 2.0], [[2.0, 4.0], [4.0, 8.0]])
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows [rows, width]."""
        rows = rows.double()
        total, mean = self.count + len(rows), rows.mean(0)
        centred, gap = rows - mean, mean - self.mean
        # Update the scatter about the mean of all rows (Chan, Golub, LeVeque).
        self._scatter += centred.T @ centred + torch.outer(gap, gap) * (self.count * len(rows) / total)
        self.mean, self.count = self.mean + gap * (len(rows) / total), total

    @property
    def covariance(self) -> Tensor:
        """The covariance [width, width] of at least two rows."""
        return self._scatter / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance. Read it only after all rows are added."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        return root


class Statistics:
    """The moments of all rows, the first ``KEPT_ROWS`` rows, and the moments of the first blocks of rows.

    Args:
        width: features per row.
        block: rows per block, or 0 for no blocks.
    """

    def __init__(self, width: int, block: int = 0) -> None:
        self.moments, self.block = Moments(width), block
        self.blocks: list[Moments] = []
        self._kept: list[Tensor] = []

    @staticmethod
    def of(parts: Iterable[Tensor]) -> "Statistics":
        """Return the statistics of features, given in parts [rows, width]."""
        statistics: Statistics | None = None
        for rows in parts:
            statistics = statistics or Statistics(rows.shape[1])
            statistics.add(rows)
        assert statistics is not None
        return statistics

    def add(self, rows: Tensor) -> None:
        """Add features [rows, width]."""
        missing = KEPT_ROWS - self.moments.count
        if missing > 0:
            self._kept.append(rows[:missing].float())
        self._fill_blocks(rows)
        self.moments.add(rows)

    @cached_property
    def kept(self) -> Tensor:
        """The kept rows [rows, width] in float32. Read it only after all rows are added."""
        return torch.cat(self._kept)

    @cached_property
    def radii(self) -> Tensor:
        """The distance [rows] from each kept row to its ``NEIGHBOURS``-th nearest neighbour."""
        from kac.metrics.distances import neighbour_radii

        return neighbour_radii(self.kept, NEIGHBOURS)

    def _fill_blocks(self, rows: Tensor) -> None:
        start, position = 0, self.moments.count
        while self.block and start < len(rows) and position < MAX_BLOCKS * self.block:
            if position % self.block == 0:
                self.blocks.append(Moments(rows.shape[1]))
            stop = start + min(self.block - position % self.block, len(rows) - start)
            self.blocks[-1].add(rows[start:stop])
            start, position = stop, position + stop - start

    def full_blocks(self) -> list[Moments]:
        """Return the blocks that are complete."""
        return [block for block in self.blocks if block.count == self.block]

    def to_bytes(self) -> bytes:
        """Serialise everything except the blocks, for the cache."""
        moments = self.moments
        tensors = {"mean": moments.mean, "scatter": moments._scatter, "kept": self.kept}
        return safetensors.torch.save(tensors, metadata={"count": str(moments.count)})

    @staticmethod
    def from_bytes(data: bytes, count: int) -> "Statistics":
        """Restore the statistics of ``count`` rows that ``to_bytes`` serialised."""
        tensors = safetensors.torch.load(data)
        statistics = Statistics(len(tensors["mean"]))
        statistics.moments.count, statistics.moments.mean = count, tensors["mean"]
        statistics.moments._scatter, statistics._kept = tensors["scatter"], [tensors["kept"]]
        return statistics
