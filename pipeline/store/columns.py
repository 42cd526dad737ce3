"""Columns of shards: loaded as arrays, shared or streamed, and gathered into batches in a given order of rows."""

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
"""Size of the group of shards that is read at a time. A larger shard is a group of its own."""

READERS = 2
"""Concurrent Ray Data tasks per reader. Each task reads the shards of its group in parallel."""

PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class Selection:
    """Some knots of some shards. Equal selections share the loaded columns."""

    store: str
    identity: StoreIdentity
    shards: tuple[Shard, ...]
    knots: tuple[str, ...]  # columns

    @property
    def scalars(self) -> list[str]:
        """The scalar columns to read."""
        return [LABEL, INTERVAL] if self.identity.is_forward else [LABEL]

    @property
    def row_bytes(self) -> int:
        """The size of a row in memory."""
        return math.prod(self.identity.sample_shape) * 4 * len(self.knots) + 24

    @property
    def bytes(self) -> int:
        """The size in memory."""
        return rows_of(self.shards) * self.row_bytes

    def groups(self, shards: Sequence[Shard]) -> list[list[Shard]]:
        """Group consecutive shards, with up to ``GROUP_BYTES`` of columns per group."""
        return group_shards(shards, GROUP_BYTES // self.row_bytes)

    def read(self, shards: Sequence[Shard]) -> pa.Table:
        """Read the columns of some shards in parallel, in the given order. Raises the errors of ``read_rows``."""
        names = [*self.scalars, *self.knots]
        tables = map_in_threads(lambda shard: read_rows(self.store, self.identity, shard, names), shards)
        return pa.concat_tables(tables)


@dataclass(frozen=True)
class Columns:
    """Loaded rows. Processes of a node can share them through Ray's object store, which makes the arrays read-only."""

    selection: Selection
    sample_id: np.ndarray  # [rows]
    label: np.ndarray  # [rows]
    guidance: np.ndarray  # [rows], float32
    knots: np.ndarray  # [rows, knots, *sample]
    interval: np.ndarray | None  # [rows]; only in forward stores
    selected: np.ndarray  # [selected knots], indices into ``knots``


class Batch(NamedTuple):
    """Rows of a store."""

    sample_id: Tensor  # [batch], int64
    label: Tensor  # [batch], int64
    knots: Tensor  # [batch, len(knots), *sample], float32
    interval: Tensor | None  # [batch], int64: the interval of each row; only in forward stores


Piece = tuple[Columns, Tensor]
"""Loaded columns, and the indices of the rows to use, in order."""

AnyBatch = TypeVar("AnyBatch", Batch, Interval)

_shared: list[Columns] = []


def load(selection: Selection) -> Columns:
    """Load the selected columns, unless this process shares them. Raises the errors of ``Selection.read``."""
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
    """Inside the block, every reader of this process uses these columns instead of loading them."""
    _shared.extend(columns)
    try:
        yield
    finally:
        _shared.clear()


def merge_selections(selections: Iterable[Selection]) -> list[Selection]:
    """Merge selections of the same shards into one that has all their knots."""
    merged: dict[Selection, set[str]] = {}
    for selection in selections:
        merged.setdefault(replace(selection, knots=()), set()).update(selection.knots)
    return [replace(selection, knots=tuple(sorted(knots))) for selection, knots in merged.items()]


def to_columns(selection: Selection, shards: Sequence[Shard], tables: Iterable[pa.Table]) -> Columns:
    """Convert the rows of some shards, in ``tables`` of one or several shards, to arrays."""
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
    """Gather the selected knots of the rows."""
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
        times: [knots], the times of the selected knots; of all knots in a forward store.
        drawn: indices of the start and end among the selected knots, [batch] each; None in a forward store.
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
    """Yield the selected columns of each group of shards, in order. Ray Data prefetches about ``ahead_bytes``.

    Raises the errors of ``Selection.read``.
    """
    if not groups or torch.utils.data.get_worker_info() is not None:
        # A DataLoader worker prefetches by itself. It is a fork of its parent and has no connection to Ray.
        yield from map(selection.read, groups)
        return
    import ray

    from pipeline.cluster.ray_data import each

    cluster.connect()
    columns = replace(selection, shards=())  # a task needs only its own group; fewer bytes to unpack

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        try:
            return columns.read([Shard.from_json(text) for text in json.loads(batch["item"][0])])
        except StoreError as error:  # if raised here, Ray would wrap it in its own error with two stack traces
            return pa.table({"error": [str(error)]})

    items = [json.dumps([shard.to_json() for shard in group]) for group in groups]
    # Reading mostly waits for the disk or the network. A task that asked for a CPU would wait indefinitely where
    # trainers hold all CPUs.
    pool = ray.data.TaskPoolStrategy(size=min(READERS, len(groups)))
    tables = each(items, read, compute=pool, blocks=len(items), pause_seconds=PAUSE_SECONDS, num_cpus=0)
    # By default Ray Data splits blocks of more than 128 MiB, but here a block must be a whole group.
    tables.context.target_max_block_size = None
    options = tables.context.execution_options
    options.preserve_order = True
    # By default a pipeline fills half of the object store, and every worker on a node has its own pipeline.
    ahead_bytes = max(ahead_bytes, 2 * READERS * GROUP_BYTES)
    options.resource_limits = options.resource_limits.copy(object_store_memory=ahead_bytes)
    blocks = tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    for _, table in zip(groups, blocks, strict=True):
        if table.column_names == ["error"]:
            raise StoreError(table["error"][0].as_py())
        yield table
