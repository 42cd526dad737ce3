"""Load, share and stream the columns of shards, and gather their rows into batches in a given order."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kac.losses import Interval
from pipeline.store.layout import INTERVAL, LABEL, Shard, StoreIdentity
from pipeline.store.order import group_shards, rows_of
from pipeline.store.shards import column_array, map_in_threads, read_rows

GROUP_BYTES = 64 << 20
"""Maximum size of a group of shards that are read together. A larger shard forms its own group."""


@dataclass(frozen=True)
class Selection:
    """The shards and the knots to read. Equal selections share their loaded columns."""

    store: str
    identity: StoreIdentity
    shards: tuple[Shard, ...]
    knots: tuple[str, ...]  # names of columns

    @property
    def scalars(self) -> list[str]:
        """The scalar columns to read."""
        return [LABEL, INTERVAL] if self.identity.is_forward else [LABEL]

    @property
    def row_bytes(self) -> int:
        """The size of a row in memory, in bytes."""
        return math.prod(self.identity.sample_shape) * 4 * len(self.knots) + 24

    @property
    def bytes(self) -> int:
        """The size of all rows in memory, in bytes."""
        return rows_of(self.shards) * self.row_bytes

    def groups(self, shards: Sequence[Shard]) -> list[list[Shard]]:
        """Group consecutive shards, with up to ``GROUP_BYTES`` of columns per group."""
        return group_shards(shards, GROUP_BYTES // self.row_bytes)


@dataclass(frozen=True)
class Columns:
    """Loaded columns. Processes on a node can share columns through Ray's object store. Shared arrays are read-only."""

    selection: Selection
    sample_id: np.ndarray  # [rows]
    label: np.ndarray  # [rows]
    guidance: np.ndarray  # [rows], float32
    knots: np.ndarray  # [rows, knots, *sample]
    interval: np.ndarray | None  # [rows]; None for a trajectory store
    selected: np.ndarray  # [selected knots], indices into ``knots``


class Batch(NamedTuple):
    """A batch of rows from a store."""

    sample_id: Tensor  # [batch], int64
    label: Tensor  # [batch], int64
    knots: Tensor  # [batch, len(knots), *sample], float32
    interval: Tensor | None  # [batch], int64: each row's interval; None for a trajectory store


Piece = tuple[Columns, Tensor]
"""Loaded columns, and the indices of the rows to use, in the order of use."""

AnyBatch = TypeVar("AnyBatch", Batch, Interval)

_shared: list[Columns] = []


def load(selection: Selection) -> Columns:
    """Return the selected columns, from ``use_shared`` if it has them. Raises the errors of ``read_rows``."""
    for shared in _shared:
        knots = shared.selection.knots
        if shared.selection == replace(selection, knots=knots) and set(selection.knots) <= set(knots):
            selected = np.array([knots.index(name) for name in selection.knots])
            return replace(shared, selection=selection, selected=selected)
    return read_columns(selection, selection.shards)


@contextmanager
def use_shared(columns: Sequence[Columns]) -> Iterator[None]:
    """Inside the block, every reader in this process uses these columns instead of loading its own."""
    _shared.extend(columns)
    try:
        yield
    finally:
        _shared.clear()


def merge_selections(selections: Iterable[Selection]) -> list[Selection]:
    """Merge selections that have the same shards into one selection with all their knots."""
    merged: dict[Selection, set[str]] = {}
    for selection in selections:
        merged.setdefault(replace(selection, knots=()), set()).update(selection.knots)
    return [replace(selection, knots=tuple(sorted(knots))) for selection, knots in merged.items()]


def read_columns(selection: Selection, shards: Sequence[Shard]) -> Columns:
    """Read the selected columns of ``shards``. Raises the errors of ``read_rows``."""
    ids = np.concatenate([np.arange(shard.ids.start, shard.ids.stop) for shard in shards])
    guidance = np.repeat([shard.guidance for shard in shards], [shard.rows for shard in shards]).astype(np.float32)
    knots = np.empty((len(ids), len(selection.knots), *selection.identity.sample_shape), np.float32)
    scalars = {name: np.empty_like(ids) for name in selection.scalars}
    starts = dict(zip(shards, itertools.accumulate((shard.rows for shard in shards), initial=0), strict=False))

    def read(shard: Shard) -> None:
        rows = slice(starts[shard], starts[shard] + shard.rows)
        table = read_rows(selection.store, selection.identity, shard, [*selection.scalars, *selection.knots])
        for name, values in scalars.items():
            values[rows] = column_array(table[name])
        for k, name in enumerate(selection.knots):
            knots[rows, k] = column_array(table[name])

    for group in selection.groups(shards):  # the tables of all shards, alongside the arrays, would double the memory
        map_in_threads(read, group)
    selected = np.arange(len(selection.knots))
    return Columns(selection, ids, scalars[LABEL], guidance, knots, scalars.get(INTERVAL), selected)


def gather_rows(pieces: Sequence[Piece]) -> Batch:
    """Gather the rows of the pieces, with their selected knots, into one batch."""
    parts = []
    for columns, order in pieces:
        rows = order.numpy()
        arrays = columns.sample_id[rows], columns.label[rows], columns.knots[rows[:, None], columns.selected]
        sample_id, label, knots = map(torch.from_numpy, arrays)
        interval = None if columns.interval is None else torch.from_numpy(columns.interval[rows])
        parts.append(Batch(sample_id, label, knots, interval))
    return _concatenate(parts)


def gather_intervals(pieces: Sequence[Piece], times: Tensor, drawn: tuple[Tensor, Tensor] | None) -> Interval:
    """Gather one interval per row.

    Args:
        times: [knots], the times of the selected knots, or of all knots if the store is a forward store.
        drawn: each interval's start and end, as indices of selected knots: [batch] each. None for a forward store.
    """
    parts, done = [], 0
    for columns, order in pieces:
        rows = order.numpy()
        if drawn is None:
            assert columns.interval is not None
            start, end = columns.interval[rows], columns.interval[rows] + 1
            i, j = columns.selected
        else:
            start, end = (positions[done : done + len(rows)].numpy() for positions in drawn)
            i, j = columns.selected[start], columns.selected[end]
        ends = columns.knots[rows, i], columns.knots[rows, j]
        arrays = (*ends, times.numpy()[start], times.numpy()[end], columns.label[rows], columns.guidance[rows])
        parts.append(Interval(*map(torch.from_numpy, arrays)))
        done += len(rows)
    return _concatenate(parts)


def _concatenate(parts: Sequence[AnyBatch]) -> AnyBatch:
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return type(parts[0])(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]
