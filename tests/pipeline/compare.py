"""What a store holds, read with plain pyarrow, and when two stores are the same."""

import hashlib
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kac.util import files

KNOT_TOLERANCE = 1e-5
"""Between runs that cut the samples into other batches: the order of additions in a matrix product may differ."""


def read_store(store: str) -> tuple[dict, dict[float, pa.Table]]:
    """The manifest, and the rows of each guidance scale by sample id.

    On the way it asserts what holds for every finished store: the manifest names exactly the files that are there, with
    their sizes and hashes, and nothing else lies about.
    """
    manifest = json.loads(files.read_bytes(files.join(store, "manifest.json")))
    named = {receipt["name"]: receipt for receipt in manifest["shards"]}
    assert len(named) == len(manifest["shards"]), "a shard is named twice"
    others = [name for name in list_files(store) if name not in named]
    assert set(others) - {"run.json"} == {"manifest.json"}, "files that the manifest does not name"
    assert not set(named) - set(list_files(store)), "files that are not there"
    tables: dict[float, list[pa.Table]] = {}
    for name, receipt in named.items():
        data = files.read_bytes(files.join(store, name))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (receipt["bytes"], receipt["sha256"]), name
        tables.setdefault(receipt["guidance"], []).append(pq.read_table(pa.BufferReader(data)))
        assert tables[receipt["guidance"]][-1].num_rows == receipt["rows"], name
    return manifest, {w: pa.concat_tables(parts).sort_by("sample_id") for w, parts in tables.items()}


def list_files(store: str) -> list[str]:
    """Every file below a store, hidden ones too, by its path there."""
    location = files.locate(store)
    found = location.fs.find(location.path)
    return sorted(path.removeprefix(location.path).lstrip("/") for path in found)


def assert_same_store(found: str, expected: str) -> None:
    """Both hold the same samples, each once: ids, labels and noise to the bit, what was computed within tolerance."""
    found_manifest, found_rows = read_store(found)
    expected_manifest, expected_rows = read_store(expected)
    for key in ("schema_version", "fingerprint", "identity", "extents"):
        assert found_manifest[key] == expected_manifest[key], key
    assert sorted(found_rows) == sorted(expected_rows)
    for w, theirs in expected_rows.items():
        ours = found_rows[w]
        ids = ours["sample_id"].to_pylist()
        planned = next(part["ids"] for part in expected_manifest["extents"] if part["guidance"] == w)
        assert ids == [i for start, stop in planned for i in range(start, stop)], _what_is_wrong(ids)
        assert ours.schema.equals(theirs.schema)
        noise = next(name for name in ours.column_names if name.startswith("knot_"))
        for name in ours.column_names:
            mine, other = _array(ours[name]), _array(theirs[name])
            if mine.dtype.kind == "i" or name == noise:
                assert np.array_equal(mine, other), f"{name} at guidance {w}"
            else:
                np.testing.assert_allclose(
                    mine, other, rtol=KNOT_TOLERANCE, atol=KNOT_TOLERANCE, err_msg=f"{name} at guidance {w}"
                )


def _what_is_wrong(ids: list[int]) -> str:
    twice = [i for i, times in Counter(ids).items() if times > 1]
    return f"ids held more than once: {twice[:8]}; {len(set(ids))} different ids in all"


def _array(column: pa.ChunkedArray) -> np.ndarray:
    array = pa.concat_arrays(column.chunks)
    return array.to_numpy_ndarray() if isinstance(array, pa.FixedShapeTensorArray) else array.to_numpy()
