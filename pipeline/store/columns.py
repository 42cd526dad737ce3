"""Load, share and stream the columns of shards, and gather their rows into batches in a given order."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kac.losses import Interval
from pipeline.cluster import connection as cluster
from pipeline.store.layout import INTERVAL, LABEL, Shard, StoreError, StoreIdentity
from pipeline.store.order import group_shards, rows_of
from pipeline.store.shards import column_array, map_in_threads, read_rows

GROUP_BYTES = 64 << 20
"""Maximum size of a group of shards, which one task reads at a time. A larger shard forms its own group."""

READERS = 2
"""Concurrent Ray Data tasks per reader. Each task reads the shards of its group in parallel."""

PAUSE_SECONDS = 0.02


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

    def read(self, shards: Sequence[Shard]) -> pa.Table:
        """Read the selected columns of ``shards`` in parallel, and join them. Raises the errors of ``read_rows``."""
        names = [*self.scalars, *self.knots]
        tables = map_in_threads(lambda shard: read_rows(self.store, self.identity, shard, names), shards)
        return pa.concat_tables(tables)


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
    """Return the selected columns, from ``use_shared`` if it has them. Raises the errors of ``Selection.read``."""
    for shared in _shared:
        knots = shared.selection.knots
        if shared.selection == replace(selection, knots=knots) and set(selection.knots) <= set(knots):
            selected = np.array([knots.index(name) for name in selection.knots])
            return replace(shared, selection=selection, selected=selected)
    # Read a few shards at a time: holding the tables of all shards alongside the arrays would double the memory.
    groups = selection.groups(selection.shards)
    return to_columns(selection, selection.shards, map(selection.read, groups))


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


def to_columns(selection: Selection, shards: Sequence[Shard], tables: Iterable[pa.Table]) -> Columns:
    """Convert the rows of ``shards`` to arrays. Each table has the rows of one or more consecutive shards."""
    ids = np.concatenate([np.arange(shard.ids.start, shard.ids.stop) for shard in shards])
    guidance = np.repeat([shard.guidance for shard in shards], [shard.rows for shard in shards]).astype(np.float32)
    knots = np.empty((len(ids), len(selection.knots), *selection.identity.sample_shape), np.float32)
    scalars = {name: np.empty_like(ids) for name in selection.scalars}
    start = 0
    for table in tables:
        rows = slice(start, start + table.num_rows)
        for name, values in scalars.items():
            values[rows] = column_array(table[name])
        for k, name in enumerate(selection.knots):
            knots[rows, k] = column_array(table[name])
        start = rows.stop
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


def read_ahead(selection: Selection, groups: Sequence[Sequence[Shard]], ahead_bytes: int) -> Iterator[pa.Table]:
    """Yield the selected columns of one group of shards after another. Ray Data prefetches about ``ahead_bytes``.

    Raises the errors of ``Selection.read``.
    """
    if not groups or torch.utils.data.get_worker_info() is not None:
        # A DataLoader worker already prefetches. Because the worker is a forked process, it has no connection to Ray.
        yield from map(selection.read, groups)
        return
    import ray

    from pipeline.cluster.ray_data import each

    cluster.connect()
    columns = replace(selection, shards=())  # a task needs only the shards of its group

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        try:
            return columns.read([Shard.from_json(text) for text in json.loads(batch["item"][0])])
        except StoreError as error:  # Ray would wrap a raised error in a Ray error with two tracebacks
            return pa.table({"error": [str(error)]})

    items = [json.dumps([shard.to_json() for shard in group]) for group in groups]
    # The tasks reserve no CPU, because they mostly wait for the disk or the network. If they reserved a CPU, they
    # would wait indefinitely while trainers use all CPUs.
    pool = ray.data.TaskPoolStrategy(size=min(READERS, len(groups)))
    tables = each(items, read, compute=pool, blocks=len(items), pause_seconds=PAUSE_SECONDS, num_cpus=0)
    # By default, Ray Data splits blocks of more than 128 MiB, but each of these blocks must be a complete group.
    tables.context.target_max_block_size = None
    options = tables.context.execution_options
    options.preserve_order = True
    # By default, a pipeline may fill half of the object store, but every worker on a node has its own pipeline.
    ahead_bytes = max(ahead_bytes, 2 * READERS * GROUP_BYTES)
    options.resource_limits = options.resource_limits.copy(object_store_memory=ahead_bytes)
    blocks = tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    for _, table in zip(groups, blocks, strict=True):
        if table.column_names == ["error"]:
            raise StoreError(table["error"][0].as_py())
        yield table
