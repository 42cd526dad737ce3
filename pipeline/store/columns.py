"""Columns: what is wanted of some shards, as Arrow tables and as tensors.

Whose turn it is and in which order is no part of it: see ``order``.
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
from pipeline.store.layout import INTERVAL, LABEL, Shard, StoreError, StoreIdentity, full_shard, knot_column
from pipeline.store.shards import UNREADABLE, check_footer, column_array, reason
from pipeline.store.threads import in_threads


@dataclass(frozen=True)
class Selection:
    """Some knots of some shards; once loaded, they serve every equal selection."""

    store: str
    identity: StoreIdentity
    shards: tuple[Shard, ...]
    knots: tuple[str, ...]  # columns

    @property
    def scalars(self) -> list[str]:
        """The other columns that are read."""
        return [name for name in self.identity.scalar_columns if name in (LABEL, INTERVAL)]

    @property
    def row_bytes(self) -> int:
        """What a row takes as tensors."""
        return math.prod(self.identity.sample_shape) * 4 * len(self.knots) + 24


@dataclass(frozen=True)
class Columns:
    """Loaded rows."""

    sample_id: Tensor  # [rows]
    label: Tensor  # [rows]
    guidance: Tensor  # [rows], float32
    knots: Tensor  # [rows, knots, *sample]
    interval: Tensor | None  # [rows], of forward stores
    places: Tensor | None = (
        None  # [selected knots]: where they are among the knots of lent columns; None: all, in order
    )

    def at(self, places: Tensor) -> "Columns":
        """The same memory, with some of its knots selected."""
        return replace(self, places=None if places.tolist() == list(range(self.knots.shape[1])) else places)

    def knots_of(self, rows: Tensor) -> Tensor:
        """The selected knots of some rows: [rows, selected knots, *sample]."""
        return self.knots[rows] if self.places is None else self.knots[rows[:, None], self.places]

    def knot_of(self, rows: Tensor, place: Tensor) -> Tensor:
        """Of each row the selected knot at its ``place`` [rows]: [rows, *sample]."""
        return self.knots[rows, place if self.places is None else self.places[place]]


def columns_of_knots(identity: StoreIdentity, knots: Sequence[int] | None) -> tuple[str, ...]:
    """The columns of the knots of these indices; None: of all.

    Raises:
        StoreError: no knots, the same one twice, one that is not stored, or a choice of a forward store's.
    """
    if knots is None:
        return tuple(identity.knot_columns)
    if identity.source == "forward":
        raise StoreError("knots: expected None for a forward store: its rows have one interval each")
    outside = [k for k in knots if not 0 <= k <= identity.knots]
    if outside or not knots or len(set(knots)) < len(knots):
        raise StoreError(f"knots: expected different indices 0 .. {identity.knots}, found {list(knots)}")
    return tuple(knot_column(k, identity.knots) for k in knots)


def shard_at(store: str, identity: StoreIdentity, name: str) -> Shard:
    """The shard that is under this name, with the rows of its footer.

    Raises:
        StoreError: it is damaged, or of another store or place; the message names it.
    """
    shard = full_shard(name, identity.shard_size)
    assert shard is not None
    with open_shard(store, identity, shard) as file:
        return replace(shard, rows=file.metadata.num_rows)


def read_group(selection: Selection, group: Sequence[Shard]) -> pa.Table:
    """The selected columns of some shards, read at once, in the order given.

    Raises:
        StoreError: as ``read_rows``.
    """
    store, identity, names = selection.store, selection.identity, [*selection.scalars, *selection.knots]
    return pa.concat_tables(in_threads(lambda shard: read_rows(store, identity, shard, names), group))


def read_rows(store: str, identity: StoreIdentity, shard: Shard, names: Sequence[str]) -> pa.Table:
    """The columns of these names of the rows that the shard is planned to have.

    Raises:
        StoreError: the shard is missing, damaged or of another store; the message names it.
    """
    with open_shard(store, identity, shard) as file:
        table = file.read(list(names))
    if table.num_rows < shard.rows:
        where, found = f"{store}/{shard.name}", table.num_rows
        raise StoreError(f"{where}: expected {shard.rows} rows, found {found}: run the rollout again to redo it")
    # A shard that grows is replaced by a longer one before the manifest counts its new rows.
    return table.select(list(names)).slice(0, shard.rows)


@contextmanager
def open_shard(store: str, identity: StoreIdentity, shard: Shard) -> Iterator[pq.ParquetFile]:
    """A shard's Parquet file, if it is the one that its name promises; errors while it is read name it too.

    Raises:
        StoreError: it is missing, damaged, of another store or place, or of a newer version.
    """
    where, advice = f"{store}/{shard.name}", f"python -m jobs.store verify {store} --repair, then run the rollout again"
    location = files.locate(files.join(store, shard.name))
    try:
        with location.fs.open(location.path, "rb") as handle:
            file = pq.ParquetFile(handle, page_checksum_verification=True, pre_buffer=True)
            check_footer(where, shard, identity, file.schema_arrow)
            yield file
    except FileNotFoundError:
        raise StoreError(f"{where}: expected a shard, found none: run the rollout again to redo it") from None
    except UNREADABLE as error:
        raise StoreError(f"{where}: expected a whole shard, found: {reason(error)}: {advice}") from None


def to_columns(selection: Selection, shards: Sequence[Shard], tables: Iterable[pa.Table]) -> Columns:
    """The selected columns of some shards as tensors; ``tables`` hold them in this order, several in one."""
    ids = torch.cat([torch.arange(shard.ids.start, shard.ids.stop) for shard in shards])
    knots = torch.empty((len(ids), len(selection.knots), *selection.identity.sample_shape))
    scalars = {name: torch.empty_like(ids) for name in selection.scalars}
    start = 0
    for table in tables:
        here = slice(start, start + table.num_rows)
        for name, target in scalars.items():
            target[here] = _tensor(table, name)
        for i, name in enumerate(selection.knots):
            knots[here, i] = _tensor(table, name)
        start += table.num_rows
    guidance = torch.cat([torch.full((len(shard.ids),), shard.guidance) for shard in shards])
    return Columns(ids, scalars[LABEL], guidance, knots, scalars.get(INTERVAL))


def _tensor(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(column_array(table[name]).copy())
