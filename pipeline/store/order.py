"""Order: which rows a rank reads in an epoch, and in which order. Pure functions of (seed, epoch, rank, world size)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.store.layout import Shard, StoreError

SHUFFLE_STREAM = 3

Item = TypeVar("Item")
Rows = TypeVar("Rows")


@dataclass(frozen=True)
class Order:
    """Whose rows they are, and the seed of their shuffle; without a seed they stay in the order of their ids."""

    rank: int
    world_size: int
    seed: int | None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise StoreError(f"rank: expected 0 .. {self.world_size - 1}, found {self.rank}")
        check_position("seed", self.seed or 0)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's of some items."""
        return items[self.rank :: self.world_size]

    def permutation(self, count: int, epoch: int, part: int = 0) -> Tensor:
        """The order of ``count`` items in a part of an epoch: [count], int64."""
        if self.seed is None:
            return torch.arange(count)
        bits = np.random.Philox(key=[self.seed, SHUFFLE_STREAM], counter=[0, 0, epoch, part])
        return torch.from_numpy(np.random.Generator(bits).permutation(count))


def check_position(name: str, value: int) -> None:
    """Refuse a place in the order of rows that does not exist: a negative start would silently read other rows.

    numpy passes the numbers of a key from 2^63 on through float64, where two seeds may become one.
    """
    if not 0 <= value < 2**63:
        raise StoreError(f"{name}: expected 0 .. 2^63 - 1, found {value}")


def windows(shards: Sequence[Shard], order: Order, epoch: int, most_rows: int) -> list[list[Shard]]:
    """An epoch of a rank: its shards in shuffled order, in windows of up to ``most_rows`` rows.

    The rows of a window are loaded and shuffled together. With room for two, the next is read while one is used.
    """
    # A rank keeps its shards: were they dealt anew each epoch, its rows an epoch would change with the short last one,
    # and a resume could not tell which epoch it is in.
    own = order.share(shards)
    shuffled = [own[i] for i in order.permutation(len(own), epoch).tolist()]
    return grouped(shuffled, most_rows)


def grouped(shards: Iterable[Shard], most_rows: int) -> list[list[Shard]]:
    """Neighbours put together up to ``most_rows`` rows, one shard at least."""
    groups: list[list[Shard]] = []
    rows = 0
    for shard in shards:
        if not groups or rows + shard.rows > most_rows:
            groups.append([])
            rows = 0
        groups[-1].append(shard)
        rows += shard.rows
    return groups


def rows_of(shards: Iterable[Shard]) -> int:
    """How many rows some shards have."""
    return sum(shard.rows for shard in shards)


def cut(pieces: Iterable[tuple[Rows, Tensor]], batch_size: int) -> Iterator[list[tuple[Rows, Tensor]]]:
    """Regroup pieces (rows, and which of them in which order) into batches of ``batch_size``; the last may be short."""
    if batch_size < 1:
        raise StoreError(f"batch_size: expected 1 or more, found {batch_size}")
    pending: list[tuple[Rows, Tensor]] = []
    have = 0
    for rows, order in pieces:
        at = 0
        while at < len(order):
            part = order[at : at + batch_size - have]
            at += len(part)
            pending.append((rows, part))
            have += len(part)
            if have == batch_size:
                yield pending
                pending, have = [], 0
    if pending:
        yield pending
