"""Shards: encoding, reading by this project and by other readers, and detection of damage."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import EndpointConnectionError

from kac.path import PathConfig
from kac.util.errors import StorageError
from pipeline.store.layout import NewerVersion, Shard, StoreError, StoreIdentity
from pipeline.store.shards import (
    DamagedShard,
    ForeignShard,
    adopt,
    check,
    column_array,
    encode,
    identity_of_shard,
    identity_or_none,
    make_table,
    publish,
)

SHARD = Shard(1.5, 2, 32, 16)


def make_identity(shape: tuple[int, ...] = (2,), dtype: str = "float32", source: str = "trajectory") -> StoreIdentity:
    return StoreIdentity(
        source=source,
        teacher_sha256="ab" * 32,
        path=PathConfig(),
        solver="ab2",
        solver_steps=8,
        knots=4,
        seed=0,
        shard_size=16,
        dtype=dtype,
        sample_shape=shape,
        class_frequencies=(0.5, 0.5),
    )


def make_rows(identity: StoreIdentity, shard: Shard = SHARD, seed: int = 0) -> pa.Table:
    random = np.random.default_rng(seed)
    size = (shard.rows, *identity.sample_shape)
    columns = {name: random.standard_normal(size).astype(identity.dtype) for name in identity.knot_columns}
    if identity.source == "forward":
        columns["interval"] = random.integers(0, 4, shard.rows)
    columns["label"], columns["kinetic_energy"] = random.integers(0, 2, shard.rows), random.random(shard.rows)
    return make_table(identity, shard, columns)


def replaced(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    """Replace the values of one column and keep the metadata."""
    field = table.schema.field(name)
    array = pa.array(values.reshape(-1).tolist(), field.type) if values.ndim == 1 else None
    if array is None:
        storage = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=field.type.storage_type)
        array = pa.ExtensionArray.from_storage(field.type, storage)
    return table.set_column(table.schema.get_field_index(name), field, array)


def with_metadata(table: pa.Table, **values: str) -> pa.Table:
    return table.replace_schema_metadata({**{k.decode(): v for k, v in table.schema.metadata.items()}, **values})


@pytest.mark.parametrize("source", ["trajectory", "forward"])
@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 4, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("compression", ["none", "zstd", "lz4"])
def test_a_shard_is_read_as_it_was_encoded(source: str, shape: tuple[int, ...], dtype, compression) -> None:
    identity = make_identity(shape, dtype, source)
    table = make_rows(identity)
    read = check("store", SHARD, identity, encode(table, compression))
    assert read.equals(table)
    for name in identity.knot_columns:
        array = column_array(read[name])
        assert array.shape == (16, *shape)
        assert array.dtype == np.dtype(dtype)
    assert column_array(read["sample_id"]).tolist() == list(SHARD.ids)


def test_a_file_has_one_row_group_split_bytes_and_statistics_only_for_scalars() -> None:
    identity = make_identity((1, 8, 8))
    data = encode(make_rows(identity), "zstd")
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    assert metadata.num_row_groups == 1
    chunks = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    assert {chunk.path_in_schema.split(".")[0] for chunk in chunks if chunk.is_stats_set} == {
        "sample_id",
        "label",
        "kinetic_energy",
    }
    knots = [chunk for chunk in chunks if chunk.path_in_schema.startswith("knot_")]
    assert len(knots) == 5
    assert all("BYTE_STREAM_SPLIT" in chunk.encodings and chunk.compression == "ZSTD" for chunk in knots)


def test_encoding_is_reproducible() -> None:
    identity = make_identity()
    assert encode(make_rows(identity), "zstd") == encode(make_rows(identity), "zstd")


def flips(data: bytes, positions, mask: int):
    for position in positions:
        changed = bytearray(data)
        changed[position] ^= mask
        yield position, bytes(changed)


@pytest.mark.parametrize("compression", ["none", "zstd", "lz4"])
@pytest.mark.parametrize("mask", [1, 0x80, 0xFF])
def test_no_flipped_byte_changes_rows_without_being_detected(compression: str, mask: int) -> None:
    """Even without a manifest, the digest and the CRCs in the file detect wrong rows."""
    identity = make_identity(dtype="float16")
    table = make_rows(identity)
    data = encode(table, compression)
    refused = 0
    for position, changed in flips(data, range(len(data)), mask):
        try:
            read = check("store", SHARD, identity, changed)
        except (DamagedShard, StoreError):
            refused += 1
        else:
            assert read.equals(table), f"byte {position} changed the rows and was not detected"
    assert refused > len(data) // 2


@pytest.mark.parametrize("compression", ["none", "zstd", "lz4"])
def test_a_flipped_byte_in_the_values_fails_the_crc_of_its_page(compression: str) -> None:
    identity = make_identity((1, 8, 8))
    data = encode(make_rows(identity), compression)
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    for i in range(metadata.num_columns):
        chunk = metadata.row_group(0).column(i)
        end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
        (_, changed), *_ = flips(data, [end - 1], 1)
        with pytest.raises(DamagedShard, match=r"guidance=1.5/shard-000002.parquet is damaged: .*CRC"):
            check("store", SHARD, identity, changed)


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -4, -8])
def test_a_truncated_or_empty_file_is_damaged(keep: int) -> None:
    identity = make_identity()
    data = encode(make_rows(identity))
    with pytest.raises(DamagedShard, match=SHARD.name):
        check("store", SHARD, identity, data[:keep])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["kinetic_energy", "knot_03"])
def test_samples_and_columns_that_are_not_finite_are_named(value: float, name: str) -> None:
    identity = make_identity()
    table = make_rows(identity)
    values = np.array(column_array(table[name]))
    values[[3, 7]] = value
    with pytest.raises(DamagedShard, match=rf"NaN or infinity in samples 35, 39 \({name}\)\.$"):
        check("store", SHARD, identity, encode(resealed(identity, replaced(table, name, values))))


def resealed(identity: StoreIdentity, table: pa.Table) -> pa.Table:
    """Rebuild the table with metadata that matches its columns."""
    return make_table(identity, SHARD, {name: column_array(table[name]) for name in table.column_names})


def test_wrong_ids_are_damage() -> None:
    identity = make_identity()
    table = make_rows(identity)
    for ids in (np.arange(33, 49), np.arange(47, 31, -1), np.full(16, 32), np.arange(16)):
        with pytest.raises(DamagedShard):
            check("store", SHARD, identity, encode(replaced(table, "sample_id", ids)))


def test_a_different_schema_is_damage() -> None:
    identity = make_identity()
    table = make_rows(identity)
    with pytest.raises(DamagedShard):
        check("store", SHARD, identity, encode(table.drop_columns(["knot_04"])))
    plain = pa.table({"x": [1.0, 2.0]})
    sink = pa.BufferOutputStream()
    pq.write_table(plain, sink)
    with pytest.raises(DamagedShard, match=SHARD.name):
        check("store", SHARD, identity, sink.getvalue().to_pybytes())


def test_a_shard_of_a_different_store_or_position_is_foreign_not_damaged() -> None:
    identity, other = make_identity(), make_identity().model_copy(update={"seed": 9})
    with pytest.raises(ForeignShard, match="seed is 9, expected 0"):
        check("store", SHARD, identity, encode(make_rows(other)))
    for other_shard in (Shard(0.0, 2, 32, 16), Shard(1.5, 1, 16, 16)):
        with pytest.raises(ForeignShard, match=r"copy of another shard: it starts at sample 32 of guidance 1.5"):
            check("store", other_shard, identity, encode(make_rows(identity)))


def test_an_inconsistent_footer_is_damaged_not_foreign() -> None:
    identity = make_identity()
    table = with_metadata(make_rows(identity), fingerprint="00" * 32)
    with pytest.raises(DamagedShard):
        check("store", SHARD, identity, encode(table))


def test_a_newer_schema_version_is_refused(tmp_path: Path) -> None:
    identity = make_identity()
    table = with_metadata(make_rows(identity), schema_version="2", identity='{"unheard": "of"}')
    with pytest.raises(StoreError, match="schema version 2") as refusal:
        check("store", SHARD, identity, encode(table))
    assert not isinstance(refusal.value, DamagedShard)
    path = tmp_path / SHARD.name
    path.parent.mkdir(parents=True)
    path.write_bytes(encode(table))
    with pytest.raises(StoreError, match="schema version 2") as refusal:
        identity_of_shard(str(tmp_path), SHARD.name)
    assert not isinstance(refusal.value, DamagedShard)


def test_the_identity_is_read_from_the_footer_or_the_shard_is_refused(tmp_path: Path) -> None:
    identity = make_identity()
    path = tmp_path / SHARD.name
    publish(str(tmp_path), SHARD, identity, encode(make_rows(identity)))
    assert identity_of_shard(str(tmp_path), SHARD.name) == identity
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for position, changed in flips(data, range(footer, len(data), 3), 1):
        path.write_bytes(changed)
        try:
            identity_of_shard(str(tmp_path), SHARD.name)
        except StoreError as error:
            # A nested field with a damaged name looks like a field of a newer version. A full check detects the damage.
            assert isinstance(error, DamagedShard | NewerVersion), position


def test_a_published_shard_is_kept_unless_it_is_shorter_or_damaged(tmp_path: Path) -> None:
    identity, store = make_identity(), str(tmp_path)
    first, second = make_rows(identity, seed=1), make_rows(identity, seed=2)
    receipt = publish(store, SHARD, identity, encode(first))
    assert publish(store, SHARD, identity, encode(second)) == receipt
    assert adopt(store, SHARD, identity)[1].equals(first)
    shorter = Shard(1.5, 2, 32, 13)
    assert publish(store, shorter, identity, encode(make_rows(identity, shard=shorter))) == receipt
    (tmp_path / SHARD.name).write_bytes(encode(make_rows(identity, shard=shorter)))
    longer = publish(store, SHARD, identity, encode(second))
    assert adopt(store, SHARD, identity)[0] == longer
    (tmp_path / SHARD.name).write_bytes(b"damaged")
    assert publish(store, SHARD, identity, encode(first)) == receipt
    assert [path.name for path in (tmp_path / SHARD.name).parent.iterdir()] == ["shard-000002.parquet"]


PLAIN_READER = """
    import importlib.abc, json, sys

    class Blocked(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {"ray", "kac", "pipeline", "jobs", "torch", "mlflow", "pandas"}:
                raise ImportError(f"{name} is blocked in this test")

    sys.meta_path.insert(0, Blocked())
    root, shape = sys.argv[1], json.loads(sys.argv[2])

    import numpy as np
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.parquet as pq

    guidance = pa.dataset.partitioning(pa.schema([("guidance", pa.float64())]), flavor="hive")
    table = pq.read_table(f"{root}/data", partitioning=guidance).combine_chunks()
    knot = table["knot_02"].chunk(0)
    assert isinstance(knot, pa.FixedShapeTensorArray), knot.type
    values = knot.to_numpy_ndarray()
    assert list(values.shape[1:]) == shape, values.shape
    arrow = {
        "rows": table.num_rows,
        "dtype": str(values.dtype),
        "sum": float(values.astype(np.float64).sum()),
        "labels": table["label"].to_pylist(),
        "guidance": sorted(set(table["guidance"].to_pylist())),
        "ids": table["sample_id"].to_pylist(),
        "columns": [name for name in table.column_names if name.startswith("knot_")],
    }

    import duckdb

    source = f"read_parquet('{root}/data/*/*.parquet', hive_partitioning=true)"
    def ask(query):
        return duckdb.sql(query.replace("STORE", source)).fetchall()
    duck = {
        "rows": ask("select count(*) from STORE")[0][0],
        "length": ask("select distinct len(knot_02) from STORE"),
        "sum": ask("select sum(x::double) from (select unnest(knot_02) as x from STORE)")[0][0],
        "labels": [row[0] for row in ask("select label from STORE order by guidance::double, sample_id")],
        "guidance": [float(row[0]) for row in ask("select distinct guidance from STORE order by 1")],
        "one scale": ask("select count(*) from STORE where guidance = 1.5")[0][0],
    }
    print(json.dumps({"arrow": arrow, "duck": duck}))
"""


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("compression", ["none", "zstd", "lz4"])
def test_pyarrow_and_duckdb_read_a_store_without_this_project(tmp_path: Path, shape, dtype, compression) -> None:
    identity = make_identity(shape, dtype)
    shards = [Shard(w, index, 16 * index, 16) for w in (0.0, 1.5) for index in range(2)]
    tables = [make_rows(identity, shard, seed=n) for n, shard in enumerate(shards)]
    for shard, table in zip(shards, tables, strict=True):
        publish(str(tmp_path / "store"), shard, identity, encode(table, compression))
    (tmp_path / "elsewhere").mkdir()
    answer = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(PLAIN_READER), str(tmp_path / "store"), json.dumps(shape)],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    total = sum(float(column_array(table["knot_02"]).astype(np.float64).sum()) for table in tables)
    labels = [int(label) for table in tables for label in column_array(table["label"])]
    arrow, duck = found["arrow"], found["duck"]
    assert arrow["rows"] == duck["rows"] == 64
    assert arrow["dtype"] == dtype
    assert arrow["sum"] == pytest.approx(total, abs=1e-9)
    assert duck["sum"] == pytest.approx(total, abs=1e-9)
    assert arrow["labels"] == duck["labels"] == labels
    assert arrow["guidance"] == duck["guidance"] == [0.0, 1.5]
    assert arrow["ids"] == [*range(32), *range(32)]
    assert arrow["columns"] == [f"knot_{k:02d}" for k in range(5)]
    assert duck["length"] == [[int(np.prod(shape))]]
    assert duck["one scale"] == 32


REFUSALS = (PermissionError("403"), ConnectionError("reset"), EndpointConnectionError(endpoint_url="x"))


@pytest.mark.parametrize("error", REFUSALS)
def test_a_refused_access_is_no_damage(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = make_identity()
    publish(str(tmp_path), SHARD, identity, encode(make_rows(identity)))

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.open", refuse)
    for read in (identity_of_shard, identity_or_none):
        with pytest.raises(StorageError, match="cannot be read"):
            read(str(tmp_path), SHARD.name)
