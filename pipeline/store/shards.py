"""Encode, publish, read and check one shard.

Every page has a CRC, the footer has a digest of all values, and the manifest stores the file's sha256. Therefore,
every flipped bit is detected.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError

from kac.util import files
from kac.util.errors import StorageError, one_line
from kac.util.options import Options
from pipeline.store.layout import (
    KINETIC_ENERGY,
    LABEL,
    SAMPLE_ID,
    SCALAR_TYPES,
    SCHEMA_VERSION,
    Shard,
    StoreError,
    StoreIdentity,
    check_identity,
    check_version,
    parse,
)

CONTENT_SHA256 = "content_sha256"

NO_ACCESS = (PermissionError, ConnectionError, TimeoutError, BotoCoreError)
"""The errors of a storage that refuses a request or does not answer. The file itself may be intact."""

UNREADABLE = (pa.ArrowException, OSError, KeyError, TypeError, ValueError)
"""The exceptions that can occur while a damaged file is read."""

THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


class Receipt(Options):
    """The entry of a published shard in the manifest."""

    name: str
    guidance: float
    start: int
    rows: int
    bytes: int
    sha256: str


class DamagedShard(StoreError):
    """A shard is missing or damaged, and must be recomputed."""


class NotFiniteShard(DamagedShard):
    """A shard contains NaN or infinity."""


class ForeignShard(StoreError):
    """An intact shard belongs to a different position or a different store. It must not be overwritten."""


def make_table(identity: StoreIdentity, shard: Shard, columns: Mapping[str, np.ndarray]) -> pa.Table:
    """Return an Arrow table whose metadata describes the shard completely.

    ``columns`` has all columns except the sample ids: [rows], or [rows, *sample_shape] for a knot.
    """
    schema = identity.arrow_schema()
    columns = {**columns, SAMPLE_ID: np.asarray(shard.ids)}
    table = pa.table([_to_arrow(columns[field.name], field.type) for field in schema], schema=schema)
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "fingerprint": identity.fingerprint(),
        "guidance": repr(shard.guidance),
        "start": str(shard.start),
        "rows": str(shard.rows),
        "identity": json.dumps(identity.values(), sort_keys=True),
    }
    return table.replace_schema_metadata({**metadata, CONTENT_SHA256: _content_sha256(table, metadata)})


def _to_arrow(values: np.ndarray, arrow_type: pa.DataType) -> pa.Array:
    if not isinstance(arrow_type, pa.FixedShapeTensorType):
        return pa.array(values.astype(arrow_type.to_pandas_dtype()))
    flat = np.ascontiguousarray(values, dtype=arrow_type.value_type.to_pandas_dtype()).reshape(-1)
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=arrow_type.storage_type)
    return pa.ExtensionArray.from_storage(arrow_type, storage)


def _content_sha256(table: pa.Table, metadata: dict[str, str]) -> str:
    # A page's CRC does not cover the footer, and a flipped bit in the footer can make a reader decode a page wrongly.
    hashed = {key: value for key, value in metadata.items() if key != CONTENT_SHA256}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode())
    for column in table.columns:
        digest.update(np.ascontiguousarray(column_array(column)).data)
    return digest.hexdigest()


def column_array(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as an array: [rows], or [rows, *sample_shape] for a knot. A single chunk is not copied."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    is_tensor = isinstance(array, pa.FixedShapeTensorArray)
    values: np.ndarray = array.to_numpy_ndarray() if is_tensor else array.to_numpy()
    return values


def encode(table: pa.Table, compression: str = "none") -> bytes:
    """Encode the table as a Parquet file with one row group and a CRC for every page."""
    sink = io.BytesIO()
    is_float32 = table.schema.types[-1].value_type == pa.float32()
    scalars = [name for name in SCALAR_TYPES if name in table.column_names]
    knots = [f"{name}.list.element" for name in table.column_names if name not in scalars]
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, table.num_rows),
        compression=compression,
        # Knot values do not repeat, so a dictionary would be built and then dropped for every page.
        use_dictionary=[LABEL],
        # DuckDB can read a byte-stream-split column only if the column is float32.
        use_byte_stream_split=knots if compression != "none" and is_float32 else False,
        write_statistics=scalars,
        write_page_checksum=True,
        data_page_size=1 << 20,
    )
    return sink.getvalue()


def publish(store: str, shard: Shard, identity: StoreIdentity, data: bytes) -> Receipt:
    """Write the encoded shard atomically, and return its receipt.

    If the shard exists with enough rows, keep it and return its receipt: a concurrent job published the same rows and
    may already have listed the file's hash. Overwrite a damaged or shorter shard.
    """
    path = files.join(store, shard.name)
    if not files.write_bytes(path, data, if_absent=True):
        with contextlib.suppress(DamagedShard, FileNotFoundError):
            receipt = adopt(store, shard, identity)[0]
            if receipt.rows >= shard.rows:
                return receipt
        files.write_bytes(path, data)
    return _receipt(shard, data, shard.rows)


def adopt(store: str, shard: Shard, identity: StoreIdentity) -> tuple[Receipt, pa.Table]:
    """Read and check a published shard; return its receipt and its rows (at least one).

    Raises ``FileNotFoundError`` if the shard does not exist, and the errors of ``check``.
    """
    data = files.read_bytes(files.join(store, shard.name))
    table = check(store, shard, identity, data)
    return _receipt(shard, data, table.num_rows), table


def confirm(store: str, shard: Shard, identity: StoreIdentity, data: bytes, listed: Receipt | None) -> Receipt:
    """Check a shard's bytes against ``listed``, its receipt in the manifest (None without one). Return their receipt.

    More rows than listed are valid: a growing store replaces its short last shard before it updates the manifest.
    Raises the errors of ``check``.
    """
    receipt = _receipt(shard, data, check(store, shard, identity, data).num_rows)
    problem = ""
    least, most = listed.rows if listed else 1, identity.shard_size
    if not least <= receipt.rows <= most:
        problem = f"has {receipt.rows} rows instead of {least if receipt.rows < least else most}"
    elif listed and receipt.rows == listed.rows and receipt.sha256 != listed.sha256:
        problem = f"has the sha256 {receipt.sha256[:12]}..., but the manifest lists {listed.sha256[:12]}..."
    if problem:
        raise DamagedShard(f"{store}/{shard.name} {problem}.")
    return receipt


def _receipt(shard: Shard, data: bytes, rows: int) -> Receipt:
    return Receipt(
        name=shard.name, guidance=shard.guidance, start=shard.start, rows=rows, bytes=len(data), sha256=sha256_of(data)
    )


def sha256_of(data: bytes) -> str:
    """Return the sha256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def check(store: str, shard: Shard, identity: StoreIdentity, data: bytes) -> pa.Table:
    """Decode a shard's bytes, and check its metadata, schema, ids and values.

    Raises:
        DamagedShard: the file is unreadable, or a CRC, the schema or an id is wrong.
        NotFiniteShard: a value is NaN or infinity.
        ForeignShard: the shard is intact, but belongs to another store or has the name of another shard.
        NewerVersion: a newer version wrote the shard.
    """
    where = f"{store}/{shard.name}"
    with _damage_named(where):
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        metadata = _metadata(where, file.schema_arrow)
        _check_types(file.schema_arrow)
        table = file.read()
        if _content_sha256(table, metadata) != metadata[CONTENT_SHA256]:
            raise ValueError(f"the values do not match the sha256 {metadata[CONTENT_SHA256][:12]}... in the footer")
        _check_footer(where, shard, identity, file.schema_arrow)
    check_rows(where, shard, identity, table)
    return table


def _check_types(schema: pa.Schema) -> None:
    # Ray registers an Arrow type whose values are pickles, and a malicious file could use that type.
    for field in schema:
        if isinstance(field.type, pa.BaseExtensionType) and not isinstance(field.type, pa.FixedShapeTensorType):
            raise ValueError(f"the column {field.name} has the unknown type {field.type.extension_name}")


def _check_footer(where: str, shard: Shard, identity: StoreIdentity, schema: pa.Schema) -> None:
    found, position = read_footer(where, schema)
    check_identity(found, identity, f"{where} belongs to another store", "Move it away.", ForeignShard)
    if (position.guidance, position.start) != (shard.guidance, shard.start):
        found_at, expected_at = (f"sample {one.start} of guidance {one.guidance}" for one in (position, shard))
        problem = f"{where} is a copy of another shard: it starts at {found_at}, not at {expected_at}"
        raise ForeignShard(f"{problem}. Move it away.")
    # Arrow silently skips missing columns when it reads rows.
    if not schema.remove_metadata().equals(identity.arrow_schema()):
        raise ValueError(f"its columns are {schema.names}")


def check_rows(where: str, shard: Shard, identity: StoreIdentity, table: pa.Table) -> None:
    """Raise ``DamagedShard`` if a sample id is wrong, and ``NotFiniteShard`` if a value is NaN or infinity."""
    ids = table[SAMPLE_ID].to_numpy()
    if len(ids) == 0 or not np.array_equal(ids, np.arange(shard.start, shard.start + len(ids))):
        raise DamagedShard(f"{where} is damaged: its sample ids are not consecutive from {shard.start}.")
    values = {name: column_array(table[name]) for name in (KINETIC_ENERGY, *identity.knot_columns)}
    bad = {name: ~np.isfinite(array).reshape(len(ids), -1).all(axis=1) for name, array in values.items()}
    names = [name for name, rows in bad.items() if rows.any()]
    if names:
        samples = ids[np.any(list(bad.values()), axis=0)]
        raise NotFiniteShard(f"{where} has NaN or infinity in samples {_some(samples, 8)} ({_some(names, 3)}).")


def _some(items: Sequence[object] | np.ndarray, most: int) -> str:
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")


def read_rows(store: str, identity: StoreIdentity, shard: Shard, names: Sequence[str]) -> pa.Table:
    """Read the named columns of a shard's first ``shard.rows`` rows. Raises the errors of ``open_shard``."""
    with open_shard(store, identity, shard) as file:
        table = file.read(list(names))
    if table.num_rows < shard.rows:
        problem = f"has {table.num_rows} rows instead of {shard.rows}"
        raise StoreError(f"{store}/{shard.name} {problem}. Run the rollout again to recompute it.")
    # A growing store replaces a short shard with a longer shard before the manifest counts the new rows.
    return table.select(list(names)).slice(0, shard.rows)


@contextmanager
def open_shard(store: str, identity: StoreIdentity, shard: Shard) -> Iterator[pq.ParquetFile]:
    """Open a shard's Parquet file and check its footer. Read errors inside the block also name the shard.

    Raises ``StoreError`` if the shard is missing, damaged, from another store or position, or from a newer version.
    """
    where, location = f"{store}/{shard.name}", files.locate(files.join(store, shard.name))
    advice = f" Run `python -m jobs.store verify {store} --repair`, then run the rollout again."
    with _damage_named(where, advice), location.fs.open(location.path, "rb") as handle:
        file = pq.ParquetFile(handle, page_checksum_verification=True, pre_buffer=True)
        _check_footer(where, shard, identity, file.schema_arrow)
        yield file


def identity_of_shard(store: str, name: str) -> StoreIdentity:
    """Return the identity in a shard's footer. Raises ``DamagedShard`` or ``NewerVersion``."""
    where, location = f"{store}/{name}", files.locate(files.join(store, name))
    with _damage_named(where, " Delete it and run the rollout again."), location.fs.open(location.path, "rb") as file:
        return read_footer(where, pq.read_schema(file))[0]


def identity_or_none(store: str, name: str) -> StoreIdentity | None:
    """Return the identity in a shard's footer, or None if the shard is missing or damaged."""
    try:
        return identity_of_shard(store, name)
    except DamagedShard:
        return None


def read_footer(where: str, schema: pa.Schema) -> tuple[StoreIdentity, Shard]:
    """Return the identity and the shard in a file's metadata. Raises ``NewerVersion`` or an error of ``UNREADABLE``."""
    metadata = _metadata(where, schema)
    identity, start = parse(where, StoreIdentity, metadata["identity"]), int(metadata["start"])
    return identity, Shard(float(metadata["guidance"]), start // identity.shard_size, start, int(metadata["rows"]))


def _metadata(where: str, schema: pa.Schema) -> dict[str, str]:
    pairs = (schema.metadata or {}).items()
    metadata = {key.decode(): value.decode() for key, value in pairs if key != b"ARROW:schema"}
    check_version(where, int(metadata["schema_version"]))
    return metadata


@contextmanager
def _damage_named(where: str, advice: str = "") -> Iterator[None]:
    """Convert the errors of reading a damaged file to ``DamagedShard``, and a failed access to ``StorageError``."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedShard(f"{where} is missing. Run the rollout again to recompute it.") from None
    except NO_ACCESS as error:
        raise StorageError(
            f"{where} cannot be read: {one_line(error, 160).rstrip('.')}. Check the access and try again."
        ) from None
    except UNREADABLE as error:
        reason = f"its footer has no {error}" if isinstance(error, KeyError) else one_line(error, 160).rstrip(".")
        raise DamagedShard(f"{where} is damaged: {reason}.{advice}") from None


def map_in_threads(work: Callable[[Item], Result], items: Iterable[Item], title: str = "") -> list[Result]:
    """Return the result of ``work`` for each item, in the order of the items. The first error cancels the other calls.

    ``title`` is the title of a progress bar that counts shards. Without a title, there is no progress bar.
    """
    from tqdm import tqdm

    pending = list(items)
    with ThreadPoolExecutor(THREADS) as pool:
        # disable=None shows the bar only on a terminal.
        disable = None if title else True
        return list(tqdm(pool.map(work, pending), title, len(pending), unit="shard", disable=disable))
