"""Columns of shards, read as Arrow tables and converted to tensors.

This module does not decide the order of rows; see ``order``.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from kac.util import files
from kac.util.errors import ArgumentError
from pipeline.store.layout import INTERVAL, LABEL, Shard, StoreError, StoreIdentity, full_shard, knot_column
from pipeline.store.shards import UNREADABLE, check_footer, column_array, describe_read_error
from pipeline.store.threads import map_in_threads


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
        return [name for name in self.identity.scalar_columns if name in (LABEL, INTERVAL)]

    @property
    def row_bytes(self) -> int:
        """The size of a row in memory, as tensors."""
        return math.prod(self.identity.sample_shape) * 4 * len(self.knots) + 24


@dataclass(frozen=True)
class Columns:
    """Loaded rows."""

    sample_id: Tensor  # [rows]
    label: Tensor  # [rows]
    guidance: Tensor  # [rows], float32
    knots: Tensor  # [rows, knots, *sample]
    interval: Tensor | None  # [rows]; only in forward stores
    selected: Tensor | None = None  # [selected knots], indices into ``knots``; None selects all knots in order

    def select(self, indices: Tensor) -> "Columns":
        """Select some knots, without a copy."""
        return replace(self, selected=None if indices.tolist() == list(range(self.knots.shape[1])) else indices)

    def knots_of(self, rows: Tensor) -> Tensor:
        """Return the selected knots of some rows: [rows, selected knots, *sample]."""
        return self.knots[rows] if self.selected is None else self.knots[rows[:, None], self.selected]

    def knot_of(self, rows: Tensor, index: Tensor) -> Tensor:
        """Return one knot per row, at position ``index`` [rows] among the selected knots: [rows, *sample]."""
        return self.knots[rows, index if self.selected is None else self.selected[index]]


def columns_of_knots(identity: StoreIdentity, knots: Sequence[int] | None) -> tuple[str, ...]:
    """Return the columns of the knots with these indices; None means all knots.

    Raises:
        ArgumentError: ``knots`` is empty, repeats an index, names a knot that is not stored, or is given for a forward
            store.
    """
    if knots is None:
        return tuple(identity.knot_columns)
    if identity.source == "forward":
        raise ArgumentError("`knots` must be None for a forward store, because each row has only one interval.")
    outside = [k for k in knots if not 0 <= k <= identity.knots]
    if outside or not knots or len(set(knots)) < len(knots):
        raise ArgumentError(f"`knots` is {list(knots)}. Give different indices from 0 to {identity.knots}.")
    return tuple(knot_column(k, identity.knots) for k in knots)


def shard_at(store: str, identity: StoreIdentity, name: str) -> Shard:
    """Return the shard with this name, with the number of rows from its footer.

    Raises:
        StoreError: the shard is damaged, or belongs elsewhere in this store or to another store. The message names it.
    """
    shard = full_shard(name, identity.shard_size)
    assert shard is not None
    with open_shard(store, identity, shard) as file:
        return replace(shard, rows=file.metadata.num_rows)


def read_group(selection: Selection, group: Sequence[Shard]) -> pa.Table:
    """Read the selected columns of some shards in parallel, and concatenate them in the given order.

    Raises:
        StoreError: as ``read_rows``.
    """
    store, identity, names = selection.store, selection.identity, [*selection.scalars, *selection.knots]
    return pa.concat_tables(map_in_threads(lambda shard: read_rows(store, identity, shard, names), group))


def read_rows(store: str, identity: StoreIdentity, shard: Shard, names: Sequence[str]) -> pa.Table:
    """Read the named columns of a shard: the first ``shard.rows`` rows.

    Raises:
        StoreError: the shard is missing, damaged or from another store. The message names it.
    """
    with open_shard(store, identity, shard) as file:
        table = file.read(list(names))
    if table.num_rows < shard.rows:
        raise StoreError(
            f"{store}/{shard.name} has {table.num_rows} rows instead of {shard.rows}. "
            "Run the rollout again to recompute it."
        )
    # A growing store replaces a short shard by a longer one before the manifest counts the new rows.
    return table.select(list(names)).slice(0, shard.rows)


@contextmanager
def open_shard(store: str, identity: StoreIdentity, shard: Shard) -> Iterator[pq.ParquetFile]:
    """Open the Parquet file of a shard and check its footer. Read errors inside the block also name the shard.

    Raises:
        StoreError: the shard is missing, damaged, from another store or position, or from a newer version.
    """
    where = f"{store}/{shard.name}"
    location = files.locate(files.join(store, shard.name))
    try:
        with location.fs.open(location.path, "rb") as handle:
            file = pq.ParquetFile(handle, page_checksum_verification=True, pre_buffer=True)
            check_footer(where, shard, identity, file.schema_arrow)
            yield file
    except FileNotFoundError:
        raise StoreError(f"{where} is missing. Run the rollout again to recompute it.") from None
    except UNREADABLE as error:
        raise StoreError(
            f"{where} is damaged: {describe_read_error(error)}. "
            f"Run `python -m jobs.store verify {store} --repair`, then run the rollout again."
        ) from None


def to_columns(selection: Selection, shards: Sequence[Shard], tables: Iterable[pa.Table]) -> Columns:
    """Convert the selected columns of some shards to tensors.

    Args:
        tables: the rows of ``shards`` in this order; a table may hold several shards.
    """
    ids = torch.cat([torch.arange(shard.ids.start, shard.ids.stop) for shard in shards])
    knots = torch.empty((len(ids), len(selection.knots), *selection.identity.sample_shape))
    scalars = {name: torch.empty_like(ids) for name in selection.scalars}
    start = 0
    for table in tables:
        rows = slice(start, start + table.num_rows)
        for name, target in scalars.items():
            target[rows] = _tensor(table, name)
        for i, name in enumerate(selection.knots):
            knots[rows, i] = _tensor(table, name)
        start += table.num_rows
    guidance = torch.cat([torch.full((len(shard.ids),), shard.guidance) for shard in shards])
    return Columns(ids, scalars[LABEL], guidance, knots, scalars.get(INTERVAL))


def _tensor(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(column_array(table[name]).copy())
