"""examine finds every flipped bit of a listed shard."""

import random
from pathlib import Path

import pytest

from pipeline.store.examine import examine
from tests.pipeline.stores import flip, make_store


@pytest.mark.parametrize("compression, dtype", [("none", "float32"), ("zstd", "float16"), ("lz4", "float32")])
def test_a_flipped_bit_anywhere_in_a_listed_shard_is_found(tmp_path: Path, teacher: str, compression, dtype) -> None:
    manifest = make_store(tmp_path / "store", teacher, trajectories=40, compression=compression, dtype=dtype)
    pick = random.Random(1)
    for receipt in manifest.shards:
        file = tmp_path / "store" / receipt.name
        good = file.read_bytes()
        assert examine(str(tmp_path / "store"), manifest.identity, receipt.name, receipt).kind == ""
        for position in {0, 3, len(good) - 8, len(good) - 1, *(pick.randrange(len(good)) for _ in range(200))}:
            flip(file, position, 1 << pick.randrange(8))
            found = examine(str(tmp_path / "store"), manifest.identity, receipt.name, receipt)
            assert found.kind == "damaged", f"byte {position}: {found}"
            file.write_bytes(good)
