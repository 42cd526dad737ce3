"""A damaged file gives a one-line error that names it, and its content is not used."""

import gzip
import hashlib
import io
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from kac.data import DataConfig, DataDescription, open_dataset, published
from kac.metrics.pretrained import torchscript
from kac.networks.weight_files import read_weights
from kac.util.errors import DistillKacError
from kac.util.integrity import check_zip, gunzip
from tests.kac.data import making

FLIPS = 40


def flipped(data: bytes, seed: int) -> bytes:
    """Return the data with one flipped bit, chosen by the seed."""
    generator, changed = random.Random(seed), bytearray(data)
    changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def check_refused(read: Callable[[], object], path: Path, damaged: bytes) -> None:
    """Check that reading the file with this content raises a one-line error that names the file."""
    path.write_bytes(damaged)
    with pytest.raises(DistillKacError) as raised:
        read()
    assert path.name in str(raised.value)
    assert "\n" not in str(raised.value)


def read(kind: str, root: Path) -> DataDescription:
    open_dataset.cache_clear()
    return open_dataset(DataConfig(kind=kind, root=str(root))).description  # type: ignore[arg-type]


def check_damage(kind: str, root: Path, path: Path, others: list[bytes]) -> None:
    """Check that truncated files, ``others`` and all flipped bits that change the data are refused."""
    whole = path.read_bytes()
    before = read(kind, root).sha256
    refused = 0
    for seed in range(FLIPS):
        path.write_bytes(flipped(whole, seed))
        try:
            assert read(kind, root).sha256 == before
        except DistillKacError as error:
            assert "\n" not in str(error)
            assert path.name in str(error)
            refused += 1
    assert refused > FLIPS // 2
    for damaged in (whole[: len(whole) // 2], whole[:-9], b"", *others):
        check_refused(lambda: read(kind, root), path, damaged)


def with_zeros(data: bytes) -> bytes:
    """Return the data with zeros in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes(100) + data[middle + 100 :]


def test_a_damaged_archive_of_cifar10_is_refused(tmp_path: Path):
    batches = making.cifar_batches(making.pixels(60, 3, 32), np.arange(60) % 10)
    path = making.write_archive(tmp_path / "cifar-10-python.tar.gz", batches)
    check_damage("cifar10", tmp_path, path, [with_zeros(path.read_bytes()), path.read_bytes() + b"more"])


def test_damaged_idx_files_are_refused(tmp_path: Path):
    making.write_idx(tmp_path, making.pixels(60, 1), np.arange(60) % 3, held_out=12, packed=True)
    for path in (tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "t10k-labels-idx1-ubyte.gz"):
        whole = path.read_bytes()
        too_long = gzip.compress(gzip.decompress(whole) + b"x")
        check_damage("idx", tmp_path, path, [with_zeros(whole), whole + b"more", too_long])
        path.write_bytes(whole)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_damaged_pages_of_parquet_files_are_refused(tmp_path: Path, compression: str):
    path = making.write_parquet(tmp_path / "p.parquet", making.pixels(60), [0, 1] * 30)
    pq.write_table(pq.read_table(path), path, compression=compression, row_group_size=20, write_page_checksum=True)
    check_damage("parquet", tmp_path, path, [])


def test_a_flipped_label_of_a_parquet_file_with_checksums_is_refused(tmp_path: Path):
    path = making.write_parquet(tmp_path / "p.parquet", making.pixels(60), [0, 1] * 30)
    pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=False, write_page_checksum=True)
    columns = pq.ParquetFile(path).metadata.row_group(0)
    (labels,) = (column for i in range(columns.num_columns) if (column := columns.column(i)).path_in_schema == "label")
    damaged = bytearray(path.read_bytes())
    damaged[labels.data_page_offset + labels.total_compressed_size - 8] ^= 1  # the last label becomes 0
    check_refused(lambda: read("parquet", tmp_path), path, bytes(damaged))


def test_damaged_png_files_are_refused(tmp_path: Path):
    making.write_folder(tmp_path, making.pixels(10, 3, 16), [0] * 10)
    path = tmp_path / "a" / "00003.png"
    check_damage("folder", tmp_path, path, [path.read_bytes()[:-12]])


@pytest.mark.parametrize("ending", ["jpg", "webp", "gif", "bmp", "tiff"])
def test_truncated_images_are_refused(tmp_path: Path, ending: str):
    making.write_folder(tmp_path, making.pixels(10, 3, 16), [0] * 10)
    (tmp_path / "a" / "00003.png").unlink()
    data = making.encoded(making.pixels(1, 3, 16)[0], ending)
    for length in (10, len(data) // 2, len(data) - 20):
        check_refused(lambda: read("folder", tmp_path), tmp_path / "a" / f"00003.{ending}", data[:length])


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2000))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :4] * self.weight[:4]


def pytorch_files() -> dict[str, bytes]:
    script, saved = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(Doubles()), script)
    torch.save(Doubles().state_dict(), saved)
    return {"script": script.getvalue(), "saved": saved.getvalue()}


@pytest.mark.parametrize("kind", ["script", "saved"])
def test_a_flipped_bit_in_the_weights_of_a_pytorch_file_is_refused(tmp_path: Path, kind: str):
    whole, path = pytorch_files()[kind], tmp_path / "net.pt"
    reader = {"script": torchscript, "saved": read_weights}[kind]
    path.write_bytes(whole)
    reader(str(path))
    at = whole.index(np.ones(2000, np.float32).tobytes())
    for seed in range(5):
        damaged = whole[:at] + flipped(whole[at : at + 8000], seed) + whole[at + 8000 :]
        check_refused(lambda: reader(str(path)), path, damaged)


def test_pytorch_files_without_checksums_are_read(tmp_path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(str(tmp_path / "w.pt")).named["weight"].tolist() == [1, 1, 1]
    check_zip(b"no archive")


def test_decompression_stops_at_the_largest_valid_size():
    packed = gzip.compress(bytes(50_000_000))
    with pytest.raises(DistillKacError, match=r"^f\.gz .* 3,000,000 bytes"):
        gunzip("f.gz", packed, lambda head: 3_000_000)
    assert gunzip("f.gz", gzip.compress(b"abc") + gzip.compress(b"de"), len) == b"abcde"


def test_an_archive_that_differs_from_the_published_one_is_read_with_a_warning(tmp_path: Path, monkeypatch):
    batches = making.cifar_batches(making.pixels(60, 3, 32), np.arange(60) % 10)
    path = making.write_archive(tmp_path / "cifar-10-python.tar.gz", batches)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    (warning,) = read("cifar10", path).warnings
    assert md5 in warning
    assert "c58f30108f718f92721af3b95e74349a" in warning
    monkeypatch.setattr(published, "MD5", md5)
    monkeypatch.setenv("DISTILLKAC_CACHE", str(tmp_path / "cache"))
    assert read("cifar10", path).warnings == ()


def test_the_warning_names_an_extracted_batch_that_differs_from_the_published_one(tmp_path: Path, monkeypatch):
    batches = making.cifar_batches(making.pixels(60, 3, 32), np.arange(60) % 10)
    for name, data in batches.items():
        (tmp_path / name).write_bytes(data)
    md5s = {name: hashlib.md5(data).hexdigest() for name, data in batches.items()}
    monkeypatch.setattr(published, "MD5_EXTRACTED", {**md5s, "data_batch_2": "0" * 32})
    (warning,) = read("cifar10", tmp_path).warnings
    assert warning.startswith(str(tmp_path / "data_batch_2"))
    assert md5s["data_batch_2"] in warning


def test_the_warning_names_an_idx_file_that_is_not_from_the_same_published_set(tmp_path: Path, monkeypatch):
    making.write_idx(tmp_path, making.pixels(60, 1), np.arange(60) % 3, held_out=12, packed=True)
    assert read("idx", tmp_path).warnings == ()
    digests = {
        re.sub("-idx.*", "", path.name): hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
        for path in tmp_path.iterdir()
    }
    assert digests.keys() == published.SHA256["MNIST"].keys()
    monkeypatch.setattr(published, "SHA256", {"DIGITS": {**digests, "t10k-images": "0" * 64}})
    monkeypatch.setenv("DISTILLKAC_CACHE", str(tmp_path / "cache"))
    (warning,) = read("idx", tmp_path).warnings
    assert warning.startswith(str(tmp_path / "t10k-images-idx3-ubyte.gz"))
    for part in ("DIGITS", digests["t10k-images"], "0" * 64):
        assert part in warning
