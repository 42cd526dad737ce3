"""The order in which a rank reads rows: pure functions of (seed, epoch, rank, world size)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kac.util.errors import ArgumentError
from pipeline.store.layout import Shard

SHUFFLE_STREAM = 3

Item = TypeVar("Item")
Rows = TypeVar("Rows")


@dataclass(frozen=True)
class Order:
    """The rank that reads, and its shuffle seed. Without a seed, the rank reads rows in the order of sample ids."""

    rank: int
    world_size: int
    seed: int | None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ArgumentError(f"`rank` is {self.rank}, but `world_size` is {self.world_size}.")
        check_position("seed", self.seed or 0)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this rank's share of the items."""
        return items[self.rank :: self.world_size]

    def permutation(self, count: int, epoch: int, part: int = 0) -> Tensor:
        """Return the order of ``count`` items in one part of an epoch: [count], int64."""
        if self.seed is None:
            return torch.arange(count)
        bits = np.random.Philox(key=[self.seed, SHUFFLE_STREAM], counter=[0, 0, epoch, part])
        return torch.from_numpy(np.random.Generator(bits).permutation(count))


def check_position(name: str, value: int) -> None:
    """Check that a seed, epoch or start is in [0, 2^63 - 1].

    A negative start would silently read the wrong rows. numpy converts a Philox key of 2^63 or more to float64, so
    different seeds would give the same shuffle.
    """
    if not 0 <= value < 2**63:
        raise ArgumentError(f"`{name}` is {value}. Give a number from 0 to 2^63 - 1.")


def windows(shards: Sequence[Shard], order: Order, epoch: int, most_rows: int) -> list[list[Shard]]:
    """Return a rank's shards for one epoch, shuffled and grouped into windows of up to ``most_rows`` rows.

    The reader shuffles the rows within a window, and reads the next window while the current window is in use.
    """
    # A rank reads the same shards in every epoch. Otherwise, the short last shard could move between ranks. The number
    # of rows per epoch would then vary, and a resumed run could not compute its current epoch.
    own = order.share(shards)
    return group_shards((own[i] for i in order.permutation(len(own), epoch).tolist()), most_rows)


def group_shards(shards: Iterable[Shard], most_rows: int) -> list[list[Shard]]:
    """Group consecutive shards. A group has at most ``most_rows`` rows, unless a single shard has more."""
    groups: list[list[Shard]] = []
    rows = 0
    for shard in shards:
        rows += shard.rows
        if not groups or rows > most_rows:
            groups.append([])
            rows = shard.rows
        groups[-1].append(shard)
    return groups


def rows_of(shards: Iterable[Shard]) -> int:
    """Return the total number of rows in ``shards``."""
    return sum(shard.rows for shard in shards)


def rebatch(pieces: Iterable[tuple[Rows, Tensor]], batch_size: int) -> Iterator[list[tuple[Rows, Tensor]]]:
    """Regroup pieces (loaded rows and indices of the rows to use) into batches; the last batch may be short."""
    if batch_size < 1:
        raise ArgumentError(f"`batch_size` is {batch_size}. Give at least 1.")
    pending: list[tuple[Rows, Tensor]] = []
    missing = batch_size
    for rows, order in pieces:
        remaining = order
        while len(remaining):
            part, remaining = remaining[:missing], remaining[missing:]
            pending.append((rows, part))
            missing -= len(part)
            if not missing:
                yield pending
                pending, missing = [], batch_size
    if pending:
        yield pending
