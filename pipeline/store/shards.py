"""One shard: encode it, publish it whole, read it back, check it.

Every page carries a CRC, and the manifest holds the file's sha256: no flipped bit goes unseen.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kac import files
from kac.options import OptionError, Options
from pipeline.store.layout import (
    INTERVAL,
    KINETIC_ENERGY,
    LABEL,
    SAMPLE_ID,
    SCHEMA_VERSION,
    Shard,
    StoreError,
    StoreIdentity,
    describe_difference,
)

CONTENT_SHA256 = "content_sha256"


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
    """The rows of a shard as an Arrow table with the shard's metadata.

    Args:
        label, kinetic_energy, interval: [rows]. knots: one array [rows, *sample_shape] a knot column.
    """
    dtype, schema = np.dtype(identity.dtype), identity.arrow_schema()
    columns: dict[str, pa.Array] = {
        SAMPLE_ID: pa.array(np.arange(shard.start, shard.start + shard.rows), pa.int64()),
        LABEL: pa.array(label.astype(np.int32)),
        KINETIC_ENERGY: pa.array(kinetic_energy.astype(np.float32)),
    }
    if interval is not None:
        columns[INTERVAL] = pa.array(interval.astype(np.int32))
    for name, knot in zip(identity.knot_columns, knots, strict=True):
        flat = pa.array(np.ascontiguousarray(knot, dtype=dtype).reshape(-1))
        tensor_type = schema.field(name).type
        storage = pa.FixedSizeListArray.from_arrays(flat, type=tensor_type.storage_type)
        columns[name] = pa.ExtensionArray.from_storage(tensor_type, storage)
    table = pa.table([columns[field.name] for field in schema], schema=schema)
    metadata = shard.metadata(identity)
    return table.replace_schema_metadata({**metadata, CONTENT_SHA256: content_sha256(table, metadata)})


def content_sha256(table: pa.Table, metadata: dict[str, str]) -> str:
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
        # DuckDB reads split bytes of float32 alone.
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
        DamagedShard, ForeignShard: as ``check``.
    """
    data = files.read_bytes(files.join(store, shard.name))
    table = check(store, shard, identity, data)
    return _receipt(shard, data, table.num_rows), table


def check(store: str, shard: Shard, identity: StoreIdentity, data: bytes) -> pa.Table:
    """Decode a shard's bytes and hold them against what the shard must be.

    Raises:
        DamagedShard: unreadable, a failed CRC, a wrong schema, wrong ids, a value that is not finite.
        ForeignShard: whole, but of another store, or under another shard's name.
    """
    where = f"{store}/{shard.name}"
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        schema = file.schema_arrow
        metadata = read_metadata(schema)
        check_version(where, int(metadata["schema_version"]))
        table = file.read()
        if content_sha256(table, metadata) != metadata[CONTENT_SHA256]:
            raise ValueError(f"values that do not have the sha256 {metadata[CONTENT_SHA256][:12]}... of its footer")
        _check_metadata(where, shard, identity, schema)
    except (pa.ArrowException, OSError, OptionError, KeyError, TypeError, ValueError) as error:
        raise DamagedShard(f"{where}: expected a whole Parquet shard, found: {_reason(error)}") from None
    expected = identity.arrow_schema()
    if not schema.remove_metadata().equals(expected):
        raise DamagedShard(f"{where}: expected the columns {expected.names}, found {schema.names}")
    _check_rows(where, shard, identity, table)
    return table


def read_metadata(schema: pa.Schema) -> dict[str, str]:
    """A shard's own metadata as text."""
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items() if key != b"ARROW:schema"}


def _spec_of(schema: pa.Schema) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(read_metadata(schema)["spec"])
    return spec


def identity_of_shard(store: str, name: str) -> StoreIdentity:
    """The identity that a shard carries in its footer.

    Raises:
        DamagedShard: no readable footer. StoreError: a newer schema version.
    """
    location = files.locate(files.join(store, name))
    try:
        with location.fs.open(location.path, "rb") as file:
            schema = pq.read_schema(file)
        check_version(f"{store}/{name}", int(read_metadata(schema)["schema_version"]))
        return StoreIdentity(**_spec_of(schema))
    except (pa.ArrowException, OSError, OptionError, KeyError, TypeError, ValueError) as error:
        raise DamagedShard(f"{store}/{name}: expected a Parquet shard of a store, found: {_reason(error)}") from None


def check_version(where: str, version: int) -> None:
    """Refuse what a newer version of this project wrote."""
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{where}: expected store schema version {SCHEMA_VERSION} or older, found {version}: use a newer distillkac"
        )


def _check_metadata(where: str, shard: Shard, identity: StoreIdentity, schema: pa.Schema) -> None:
    metadata = read_metadata(schema)
    if metadata["fingerprint"] != identity.fingerprint():
        difference = describe_difference(identity, StoreIdentity(**_spec_of(schema)))
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
    for name in [KINETIC_ENERGY, *identity.knot_columns]:
        bad = ~finite_rows(table[name])
        if bad.any():
            raise DamagedShard(
                f"{where}: expected finite values, found NaN or infinity in {name} of samples {name_ids(ids[bad])}"
            )


def finite_rows(column: pa.ChunkedArray) -> np.ndarray:
    """Which rows of a column are finite throughout: [rows] bool."""
    finite: np.ndarray = np.isfinite(column_array(column)).reshape(len(column), -1).all(axis=1)
    return finite


def column_array(column: pa.ChunkedArray) -> np.ndarray:
    """A column as numpy: [rows], or [rows, *sample_shape] for a knot, without a copy where there is one chunk."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    is_tensor = isinstance(array, pa.FixedShapeTensorArray)
    values: np.ndarray = array.to_numpy_ndarray() if is_tensor else array.to_numpy()
    return values


def name_ids(ids: np.ndarray, most: int = 8) -> str:
    """A few sample ids for a message, and how many more there are."""
    shown = ", ".join(str(i) for i in ids[:most])
    return shown if len(ids) <= most else f"{shown} and {len(ids) - most} more"


def _receipt(shard: Shard, data: bytes, rows: int) -> Receipt:
    return Receipt(
        name=shard.name,
        guidance=shard.guidance,
        start=shard.start,
        rows=rows,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error} in its footer"
    return " ".join(str(error).split())[:160] or type(error).__name__
