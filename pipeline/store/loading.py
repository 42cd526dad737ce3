"""Loading: the wanted columns of shards as Arrow tables and as tensors."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from kac import files
from pipeline.store.layout import INTERVAL, LABEL, Shard, StoreError, StoreIdentity, parse_shard_name
from pipeline.store.shards import check_version, column_array, read_metadata

THREADS = 4
"""Shards that a process reads at once."""

GROUP_BYTES = 64 << 20
"""What a streaming reader reads in one go; a larger shard is read whole."""


@dataclass(frozen=True)
class Columns:
    """Loaded rows."""

    sample_id: Tensor  # [rows]
    label: Tensor  # [rows]
    knots: Tensor  # [rows, knots, *sample]
    interval: Tensor | None

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.label)


class Part(NamedTuple):
    """The wanted columns of some shards, one after the other."""

    shards: Sequence[Shard]
    table: pa.Table


def shard_at(store: str, spec: StoreIdentity, name: str) -> Shard:
    """The shard of a store that is under a shard's name, with the rows of its footer.

    Raises:
        StoreError: it is damaged, or of another store or place; the message names it.
    """
    parsed = parse_shard_name(name)
    assert parsed is not None
    guidance, index = parsed
    planned = Shard(guidance, index, index * spec.shard_size, 0)
    with _open_shard(store, spec, planned) as file:
        return replace(planned, rows=file.metadata.num_rows)


def read_rows(store: str, spec: StoreIdentity, shard: Shard, columns: Sequence[str]) -> pa.Table:
    """The label, the interval if there is one, and the wanted columns of the rows that the shard is planned to have.

    Raises:
        StoreError: the shard is missing, damaged or of another store; the message names it.
    """
    scalars = [LABEL, INTERVAL] if spec.source == "forward" else [LABEL]
    with _open_shard(store, spec, shard) as file:
        table = file.read([*scalars, *columns])
    if table.num_rows < shard.rows:
        raise StoreError(
            f"{store}/{shard.name}: expected {shard.rows} rows, found {table.num_rows}: "
            "run the rollout again to redo it"
        )
    # A shard that grows is replaced by a longer one before the manifest counts its new rows.
    return table.select([*scalars, *columns]).slice(0, shard.rows)


def read_group(store: str, spec: StoreIdentity, group: Sequence[Shard], columns: Sequence[str]) -> Part:
    """``read_rows`` of some shards at once, in the order given.

    Raises:
        StoreError: as ``read_rows``.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return Part(group, pa.concat_tables(pool.map(lambda shard: read_rows(store, spec, shard, columns), group)))


@contextmanager
def _open_shard(store: str, spec: StoreIdentity, shard: Shard) -> Iterator[pq.ParquetFile]:
    """The Parquet file of a shard, held against its name; what fails while it is read is an error that names it."""
    where, advice = f"{store}/{shard.name}", f"python -m jobs.store verify {store} --repair, then run the rollout again"
    location = files.locate(files.join(store, shard.name))
    try:
        with location.fs.open(location.path, "rb") as handle:
            file = pq.ParquetFile(handle, page_checksum_verification=True, pre_buffer=True)
            metadata = read_metadata(file.schema_arrow)
            check_version(where, int(metadata["schema_version"]))
            place = metadata["fingerprint"], float(metadata["guidance"]), int(metadata["start"])
            if place != (spec.fingerprint(), shard.guidance, shard.start):
                raise StoreError(
                    f"{where}: expected guidance {shard.guidance:g} from sample {shard.start} on of this store, "
                    f"found another shard: {advice}"
                )
            # A column that is not there is left out by Arrow without a word.
            if not file.schema_arrow.remove_metadata().equals(spec.arrow_schema()):
                raise ValueError(f"the columns {file.schema_arrow.names}")
            yield file
    except FileNotFoundError:
        raise StoreError(f"{where}: expected a shard, found none: run the rollout again to redo it") from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise StoreError(f"{where}: expected a whole shard, found: {reason}: {advice}") from None


def to_columns(parts: Iterable[Part], rows: int, spec: StoreIdentity, knot_columns: int) -> Columns:
    """Loaded shards as tensors, in the order given."""
    knots = torch.empty((rows, knot_columns, *spec.sample_shape))
    ids, label = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    interval = torch.empty_like(label) if spec.source == "forward" else None
    start = 0
    for shards, table in parts:
        here = slice(start, start + table.num_rows)
        ids[here] = torch.cat([torch.arange(shard.ids.start, shard.ids.stop) for shard in shards])
        scalars = {LABEL: label} if interval is None else {LABEL: label, INTERVAL: interval}
        for name, target in scalars.items():
            target[here] = torch.from_numpy(column_array(table[name]).copy())
        states = [name for name in table.column_names if name not in scalars]
        for i, name in enumerate(states):
            knots[here, i] = torch.from_numpy(column_array(table[name]).copy())
        start += table.num_rows
    return Columns(ids, label, knots, interval)
