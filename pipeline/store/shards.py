"""One shard: encode it, publish it whole, read it back, check it.

Every page carries a CRC, and the manifest holds the file's sha256: no flipped bit goes unseen.
"""

import hashlib
import io
import json
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kac.util import files
from kac.util.errors import one_line
from kac.util.options import Options
from pipeline.store.layout import INTERVAL, KINETIC_ENERGY, LABEL, SAMPLE_ID, Shard, StoreError, StoreIdentity
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


def make_table(identity: StoreIdentity, shard: Shard, columns: Mapping[str, np.ndarray]) -> pa.Table:
    """The rows of a shard as an Arrow table, whose metadata say all that a reader needs to know besides.

    Args:
        columns: all but the sample ids, by name: [rows], or [rows, *sample_shape] for a knot.
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


def confirm(store: str, shard: Shard, identity: StoreIdentity, data: bytes, listed: Receipt | None) -> Receipt:
    """The receipt for a shard's bytes as they were read; they must be those that the manifest lists, if it does.

    A longer shard will do too: a rollout that adds trajectories replaces a short last one before the manifest is.

    Raises:
        StoreError: as ``check``. DamagedShard: another file than the one that was published, or too many rows.
    """
    found = _receipt(shard, data, check(store, shard, identity, data).num_rows)
    where = f"{store}/{shard.name}"
    if found.rows > identity.shard_size:
        raise DamagedShard(f"{where}: expected at most {identity.shard_size} rows, found {found.rows}")
    if listed and found.rows < listed.rows:
        raise DamagedShard(f"{where}: expected {listed.rows} rows, found {found.rows}")
    if listed and found.rows == listed.rows and found.sha256 != listed.sha256:
        expected = f"sha256 {listed.sha256[:12]}... as the manifest says"
        raise DamagedShard(f"{where}: expected {expected}, found {found.sha256[:12]}...")
    return found


def _receipt(shard: Shard, data: bytes, rows: int) -> Receipt:
    place = {"name": shard.name, "guidance": shard.guidance, "start": shard.start}
    return Receipt(**place, rows=rows, bytes=len(data), sha256=sha256_of(data))


def sha256_of(data: bytes) -> str:
    """The sha256 of a file's bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


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
        metadata = read_metadata(where, file.schema_arrow)
        _check_types(file.schema_arrow)
        table = file.read()
        if _content_sha256(table, metadata) != metadata[CONTENT_SHA256]:
            raise ValueError(f"values that do not have the sha256 {metadata[CONTENT_SHA256][:12]}... of its footer")
        check_footer(where, shard, identity, file.schema_arrow)
    except UNREADABLE as error:
        raise DamagedShard(f"{where}: expected a whole Parquet shard, found: {reason(error)}") from None
    check_rows(where, shard, identity, table)
    return table


def _check_types(schema: pa.Schema) -> None:
    """Refuse columns that no store has, before anything looks into them.

    Ray registers a type with Arrow whose values are pickles, and a file may name it.
    """
    for field in schema:
        if isinstance(field.type, pa.BaseExtensionType) and not isinstance(field.type, pa.FixedShapeTensorType):
            raise ValueError(f"the column {field.name} of the type {field.type.extension_name}")


def check_footer(where: str, shard: Shard, identity: StoreIdentity, schema: pa.Schema) -> None:
    """Compare the store, the place and the columns that a shard's footer names with what they must be.

    Raises:
        ForeignShard: of another store or place. NewerVersion: a newer version wrote it. One of ``UNREADABLE``: damaged.
    """
    metadata = read_metadata(where, schema)
    if metadata["fingerprint"] != identity.fingerprint():
        difference = identity.difference(identity_in(where, metadata))
        raise ForeignShard(f"{where}: expected a shard with {difference}: it belongs to another store; move it away")
    if (float(metadata["guidance"]), int(metadata["start"])) != (shard.guidance, shard.start):
        raise ForeignShard(
            f"{where}: expected guidance {shard.guidance} from sample {shard.start}, found guidance "
            f"{metadata['guidance']} from sample {metadata['start']}: a copy under another name; move it away"
        )
    # A column that is not there is left out by Arrow without a word.
    if not schema.remove_metadata().equals(identity.arrow_schema()):
        raise ValueError(f"the columns {schema.names}")


def check_rows(where: str, shard: Shard, identity: StoreIdentity, table: pa.Table) -> None:
    """Refuse ids that are not the shard's, and NaN or infinity.

    Raises:
        DamagedShard: the ids. NotFiniteShard: names the samples and the columns.
    """
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
    pairs = (schema.metadata or {}).items()
    metadata = {key.decode(): value.decode() for key, value in pairs if key != b"ARROW:schema"}
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
