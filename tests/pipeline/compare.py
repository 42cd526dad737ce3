"""Read stores with plain pyarrow, check them and compare them."""

import hashlib
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kac.util import files

KNOT_TOLERANCE = 1e-5
"""Tolerance between runs with different batches, where matrix products may add in a different order."""


def read_store(store: str) -> tuple[dict, dict[float, pa.Table]]:
    """Return the manifest, and the rows of each guidance scale sorted by sample id.

    Asserts that the manifest lists exactly the files in the store, with their sizes and hashes.
    """
    manifest = json.loads(files.read_bytes(files.join(store, "manifest.json")))
    named = {receipt["name"]: receipt for receipt in manifest["shards"]}
    assert len(named) == len(manifest["shards"]), "the manifest lists a shard twice"
    others = [name for name in list_files(store) if name not in named]
    assert set(others) - {"run.json"} == {"manifest.json", "README.md"}, "the manifest does not list every file"
    assert not set(named) - set(list_files(store)), "files are missing"
    tables: dict[float, list[pa.Table]] = {}
    for name, receipt in named.items():
        data = files.read_bytes(files.join(store, name))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (receipt["bytes"], receipt["sha256"]), name
        tables.setdefault(receipt["guidance"], []).append(pq.read_table(pa.BufferReader(data)))
        assert tables[receipt["guidance"]][-1].num_rows == receipt["rows"], name
    return manifest, {w: pa.concat_tables(parts).sort_by("sample_id") for w, parts in tables.items()}


def list_files(store: str) -> list[str]:
    """Return the relative paths of all files in a store, including hidden files."""
    location = files.locate(store)
    paths = location.fs.find(location.path)
    return sorted(path.removeprefix(location.path).lstrip("/") for path in paths)


def assert_same_store(found: str, expected: str) -> None:
    """Assert that both stores have the same samples once: equal ids, labels and noise; the rest within tolerance."""
    found_manifest, found_rows = read_store(found)
    expected_manifest, expected_rows = read_store(expected)
    for key in ("schema_version", "fingerprint", "identity", "extents"):
        assert found_manifest[key] == expected_manifest[key], key
    assert sorted(found_rows) == sorted(expected_rows)
    for w, expected_table in expected_rows.items():
        found_table = found_rows[w]
        ids = found_table["sample_id"].to_pylist()
        planned = next(part["ids"] for part in expected_manifest["extents"] if part["guidance"] == w)
        assert ids == [i for start, stop in planned for i in range(start, stop)], _describe(ids)
        assert found_table.schema.equals(expected_table.schema)
        noise = next(name for name in found_table.column_names if name.startswith("knot_"))
        for name in found_table.column_names:
            array, expected_array = _array(found_table[name]), _array(expected_table[name])
            if array.dtype.kind == "i" or name == noise:
                assert np.array_equal(array, expected_array), f"{name} at guidance {w}"
            else:
                np.testing.assert_allclose(
                    array, expected_array, rtol=KNOT_TOLERANCE, atol=KNOT_TOLERANCE, err_msg=f"{name} at guidance {w}"
                )


def _describe(ids: list[int]) -> str:
    repeated = [i for i, times in Counter(ids).items() if times > 1]
    return f"repeated ids: {repeated[:8]}; {len(set(ids))} different ids"


def _array(column: pa.ChunkedArray) -> np.ndarray:
    array = pa.concat_arrays(column.chunks)
    return array.to_numpy_ndarray() if isinstance(array, pa.FixedShapeTensorArray) else array.to_numpy()
