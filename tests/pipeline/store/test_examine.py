"""Examining a listed shard detects every flipped bit."""

import random
from pathlib import Path

import pytest

from pipeline.store.verify import examine
from tests.pipeline.stores import flip, make_store


@pytest.mark.parametrize("compression, dtype", [("none", "float32"), ("zstd", "float16"), ("lz4", "float32")])
def test_every_flipped_bit_in_a_listed_shard_is_detected(tmp_path: Path, teacher: str, compression, dtype) -> None:
    manifest = make_store(tmp_path / "store", teacher, trajectories=40, compression=compression, dtype=dtype)
    pick = random.Random(1)
    for receipt in manifest.shards:
        file = tmp_path / "store" / receipt.name
        good = file.read_bytes()
        assert examine(str(tmp_path / "store"), manifest.identity, receipt.name, receipt).kind == ""
        for position in {0, 3, len(good) - 8, len(good) - 1, *(pick.randrange(len(good)) for _ in range(200))}:
            flip(file, position, 1 << pick.randrange(8))
            result = examine(str(tmp_path / "store"), manifest.identity, receipt.name, receipt)
            assert result.kind == "damaged", f"byte {position}: {result}"
            file.write_bytes(good)
