"""One shard: encode it, publish it whole, read it back, check it.

Every page carries a CRC, and the manifest holds the file's sha256: no flipped bit goes unseen.
"""

import hashlib
import io
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kac import files
from kac.errors import one_line
from kac.options import Options
from pipeline.store.layout import (
    INTERVAL,
    KINETIC_ENERGY,
    LABEL,
    SAMPLE_ID,
    Shard,
    StoreError,
    StoreIdentity,
    describe_difference,
)
from pipeline.store.versions import SCHEMA_VERSION, check_version, parse

CONTENT_SHA256 = "content_sha256"

UNREADABLE = (pa.ArrowException, OSError, KeyError, TypeError, ValueError)
"""What reading a damaged file raises."""


class Receipt(Options):
    """What the manifest knows of a published shard."""

    name: str
    guidance: float
    start: int
    rows: int
    bytes: int
    sha256: str


class DamagedShard(StoreError):
    """A shard that is not whole: it must be redone."""


class NotFiniteShard(DamagedShard):
    """A shard with NaN or infinity in it."""


class ForeignShard(StoreError):
    """A whole shard that belongs to another store: it must not be overwritten."""


def make_table(
    identity: StoreIdentity,
    shard: Shard,
    label: np.ndarray,
    kinetic_energy: np.ndarray,
    knots: Sequence[np.ndarray],
    interval: np.ndarray | None = None,
) -> pa.Table:
    """The rows of a shard as an Arrow table, whose metadata say all that a reader needs to know besides.

    Args:
        label, kinetic_energy, interval: [rows]. knots: one array [rows, *sample_shape] a knot column.
    """
    schema = identity.arrow_schema()
    columns: dict[str, pa.Array] = {
        SAMPLE_ID: pa.array(np.arange(shard.start, shard.start + shard.rows), pa.int64()),
        LABEL: pa.array(label.astype(np.int32)),
        KINETIC_ENERGY: pa.array(kinetic_energy.astype(np.float32)),
    }
    if interval is not None:
        columns[INTERVAL] = pa.array(interval.astype(np.int32))
    for name, knot in zip(identity.knot_columns, knots, strict=True):
        flat = pa.array(np.ascontiguousarray(knot, dtype=identity.dtype).reshape(-1))
        tensor_type = schema.field(name).type
        storage = pa.FixedSizeListArray.from_arrays(flat, type=tensor_type.storage_type)
        columns[name] = pa.ExtensionArray.from_storage(tensor_type, storage)
    table = pa.table([columns[field.name] for field in schema], schema=schema)
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "fingerprint": identity.fingerprint(),
        "guidance": repr(shard.guidance),
        "start": str(shard.start),
        "rows": str(shard.rows),
        "identity": json.dumps(identity.values(), sort_keys=True),
    }
    return table.replace_schema_metadata({**metadata, CONTENT_SHA256: _content_sha256(table, metadata)})


def _content_sha256(table: pa.Table, metadata: dict[str, str]) -> str:
    """The digest of a shard's metadata and values, whatever their encoding.

    A page's CRC does not cover the footer, and a flipped bit there can make a reader decode a page as something else.
    """
    own = {key: value for key, value in metadata.items() if key != CONTENT_SHA256}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for column in table.columns:
        digest.update(np.ascontiguousarray(column_array(column)).data)
    return digest.hexdigest()


def encode(table: pa.Table, compression: str = "none") -> bytes:
    """The table as one Parquet file of one row group, every page with its CRC."""
    sink = io.BytesIO()
    is_float32 = table.schema.types[-1].value_type == pa.float32()
    scalars = [name for name in (SAMPLE_ID, LABEL, KINETIC_ENERGY, INTERVAL) if name in table.column_names]
    knots = [f"{name}.list.element" for name in table.column_names if name not in scalars]
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, table.num_rows),
        compression=compression,
        # Floats of a flow do not repeat: a dictionary would be built, found useless and dropped, page by page.
        use_dictionary=[LABEL],
        # Of types split into streams of bytes, DuckDB reads float32 alone.
        use_byte_stream_split=knots if compression != "none" and is_float32 else False,
        write_statistics=scalars,
        write_page_checksum=True,
        data_page_size=1 << 20,
    )
    return sink.getvalue()


def publish(store: str, shard: Shard, identity: StoreIdentity, data: bytes, replace: bool = False) -> Receipt:
    """Write the encoded shard whole or not at all, and return its receipt.

    Whoever publishes a name first wins (``replace`` is for a damaged or shorter file): a job that runs beside this one
    computes the same rows, and what one of them has hashed must stay as it is.
    """
    if not files.write_bytes(files.join(store, shard.name), data, if_absent=not replace):
        return adopt(store, shard, identity)[0]
    return _receipt(shard, data, shard.rows)


def adopt(store: str, shard: Shard, identity: StoreIdentity) -> tuple[Receipt, pa.Table]:
    """Check a published shard from end to end; returns its receipt and rows (all of them, at least one).

    Raises:
        FileNotFoundError: there is none.
        StoreError: as ``check``.
    """
    data = files.read_bytes(files.join(store, shard.name))
    table = check(store, shard, identity, data)
    return _receipt(shard, data, table.num_rows), table


def _receipt(shard: Shard, data: bytes, rows: int) -> Receipt:
    sha256 = hashlib.sha256(data).hexdigest()
    return Receipt(
        name=shard.name, guidance=shard.guidance, start=shard.start, rows=rows, bytes=len(data), sha256=sha256
    )


def check(store: str, shard: Shard, identity: StoreIdentity, data: bytes) -> pa.Table:
    """Decode a shard's bytes and compare them with what the shard must be.

    Raises:
        DamagedShard: unreadable, a failed CRC, a wrong schema, wrong ids; NotFiniteShard: NaN or infinity.
        ForeignShard: whole, but of another store, or under another shard's name.
        NewerVersion: a newer version wrote it.
    """
    where = f"{store}/{shard.name}"
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        schema = file.schema_arrow
        metadata = read_metadata(where, schema)
        table = file.read()
        if _content_sha256(table, metadata) != metadata[CONTENT_SHA256]:
            raise ValueError(f"values that do not have the sha256 {metadata[CONTENT_SHA256][:12]}... of its footer")
        _check_place(where, shard, identity, metadata)
    except UNREADABLE as error:
        raise DamagedShard(f"{where}: expected a whole Parquet shard, found: {reason(error)}") from None
    expected = identity.arrow_schema()
    if not schema.remove_metadata().equals(expected):
        raise DamagedShard(f"{where}: expected the columns {expected.names}, found {schema.names}")
    _check_rows(where, shard, identity, table)
    return table


def _check_place(where: str, shard: Shard, identity: StoreIdentity, metadata: dict[str, str]) -> None:
    if metadata["fingerprint"] != identity.fingerprint():
        difference = describe_difference(identity, identity_in(where, metadata))
        raise ForeignShard(f"{where}: expected a shard with {difference}: it belongs to another store; move it away")
    if (float(metadata["guidance"]), int(metadata["start"])) != (shard.guidance, shard.start):
        raise ForeignShard(
            f"{where}: expected guidance {shard.guidance} from sample {shard.start}, found guidance "
            f"{metadata['guidance']} from sample {metadata['start']}: a copy under another name; move it away"
        )


def _check_rows(where: str, shard: Shard, identity: StoreIdentity, table: pa.Table) -> None:
    ids = table[SAMPLE_ID].to_numpy()
    if len(ids) == 0 or not np.array_equal(ids, np.arange(shard.start, shard.start + len(ids))):
        raise DamagedShard(f"{where}: expected the sample ids from {shard.start} on, one after the other")
    values = {name: column_array(table[name]) for name in (KINETIC_ENERGY, *identity.knot_columns)}
    bad = {name: ~np.isfinite(array).reshape(len(ids), -1).all(axis=1) for name, array in values.items()}
    names = [name for name, rows in bad.items() if rows.any()]
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more columns" if len(names) > 3 else "")
        raise NotFiniteShard(
            f"{where}: expected finite values, found NaN or infinity in samples "
            f"{name_ids(ids[np.any(list(bad.values()), axis=0)])} ({shown})"
        )


def whole_identity(store: str, name: str) -> StoreIdentity | None:
    """The identity that a shard carries in its footer; None if it is damaged: then it says nothing of its store."""
    try:
        return identity_of_shard(store, name)
    except DamagedShard:
        return None


def identity_of_shard(store: str, name: str) -> StoreIdentity:
    """The identity that a shard carries in its footer.

    Raises:
        DamagedShard: no readable footer. NewerVersion: a newer version wrote it.
    """
    where, location = f"{store}/{name}", files.locate(files.join(store, name))
    try:
        with location.fs.open(location.path, "rb") as file:
            return identity_in(where, read_metadata(where, pq.read_schema(file)))
    except UNREADABLE as error:
        raise DamagedShard(f"{where}: expected a Parquet shard of a store, found: {reason(error)}") from None


def read_metadata(where: str, schema: pa.Schema) -> dict[str, str]:
    """A shard's own metadata as text.

    Raises:
        NewerVersion: a newer version wrote it. One of ``UNREADABLE``: it is damaged.
    """
    metadata = {
        key.decode(): value.decode() for key, value in (schema.metadata or {}).items() if key != b"ARROW:schema"
    }
    check_version(where, int(metadata["schema_version"]))
    return metadata


def identity_in(where: str, metadata: dict[str, str]) -> StoreIdentity:
    """The identity in a shard's metadata; raises as ``read_metadata``."""
    return parse(where, StoreIdentity, metadata["identity"])


def column_array(column: pa.ChunkedArray) -> np.ndarray:
    """A column as numpy: [rows], or [rows, *sample_shape] for a knot, without a copy where there is one chunk."""
    chunks = column.chunks or [pa.array([], column.type)]
    array = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
    is_tensor = isinstance(array, pa.FixedShapeTensorArray)
    values: np.ndarray = array.to_numpy_ndarray() if is_tensor else array.to_numpy()
    return values


def name_ids(ids: np.ndarray, most: int = 8) -> str:
    """A few sample ids for a message, and how many more there are."""
    shown = ", ".join(str(i) for i in ids[:most])
    return shown if len(ids) <= most else f"{shown} and {len(ids) - most} more"


def reason(error: Exception) -> str:
    """Why a file could not be read, on one line."""
    if isinstance(error, KeyError):
        return f"no {error} in its footer"
    return one_line(error, 160)
