"""Sizes that files declare are checked before memory or disk space is allocated."""

import gzip
import io
import resource
import struct
import tarfile
import zlib
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kac.data import DataConfig, decoded, open_dataset
from kac.data.encoded import Decoder
from kac.util.cache import cache_folder
from kac.util.errors import DistillKacError
from tests.kac.data import making

SPARE = 2 * 2**30
"""Bytes that a test may allocate, much less than any size in the data."""


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Limit the address space, so that allocating or reserving gigabytes raises ``MemoryError``."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(kind: str, root: Path, **options) -> str:
    with pytest.raises(DistillKacError) as raised:
        open_dataset(DataConfig(kind=kind, root=str(root), **options))
    assert "\n" not in str(raised.value)
    return str(raised.value).replace(str(root), "ROOT")


def write_labels(path: Path, labels: list[int], kind: pa.DataType) -> None:
    """Write a Parquet file of images with these labels."""
    images = [making.encoded(image) for image in making.pixels(len(labels))]
    pq.write_table(pa.table({"image": images, "label": pa.array(labels, kind)}), path)


@pytest.mark.parametrize(
    ("label", "kind"),
    [(2**40, pa.int64()), (2**63 - 1, pa.int64()), (2**63, pa.uint64()), (2**64 - 1, pa.uint64()), (10, pa.uint8())],
)
def test_a_label_beyond_the_number_of_images_is_refused(tmp_path: Path, label: int, kind: pa.DataType):
    write_labels(tmp_path / "p.parquet", [0] * 9 + [label], kind)
    assert f"p.parquet has the label {label}, but labels of 10 images " in refusal("parquet", tmp_path)


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64()])
def test_a_negative_label_is_refused_and_its_file_is_named(tmp_path: Path, kind: pa.DataType):
    write_labels(tmp_path / "train.parquet", [0] * 10, pa.int64())
    write_labels(tmp_path / "test.parquet", [-1] * 10, kind)
    assert "ROOT/test.parquet has the label -1" in refusal("parquet", tmp_path)


@pytest.mark.parametrize("kind", [pa.uint64(), pa.int8(), pa.uint16()])
def test_labels_of_every_integer_type_are_read(tmp_path: Path, kind: pa.DataType):
    write_labels(tmp_path / "train.parquet", [0, 1] * 5, kind)
    write_labels(tmp_path / "test.parquet", [1] * 5, pa.int64())
    data = open_dataset(DataConfig(kind="parquet", root=str(tmp_path)))
    assert data.description.num_classes == 2
    assert data.held_out.labels.tolist() == [1] * 5


def test_an_idx_label_beyond_the_number_of_images_is_refused(tmp_path: Path):
    making.write_idx(tmp_path, making.pixels(20, 1), np.array([0] * 19 + [200]), held_out=4)
    assert "t10k-labels-idx1-ubyte has the label 200, but labels of 20 images " in refusal("idx", tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(2**32 - 1, 2**32 - 1, 2**32 - 1), (16, 2**20, 2**20), (17, 8, 8)])
def test_an_idx_header_with_more_values_than_the_file_is_refused(tmp_path: Path, shape: tuple[int, ...], packed: bool):
    making.write_idx(tmp_path, making.pixels(20, 1), np.arange(20) % 2, held_out=4)
    path = tmp_path / "train-images-idx3-ubyte"
    data = path.read_bytes()[:4] + np.array(shape, ">u4").tobytes() + path.read_bytes()[16:]
    path.unlink()
    path = path.with_name(f"{path.name}.gz") if packed else path
    path.write_bytes(gzip.compress(data) if packed else data)
    assert refusal("idx", tmp_path).startswith(f"ROOT/{path.name} ")


def test_an_idx_file_that_decompresses_to_more_than_its_header_says_is_refused(tmp_path: Path):
    making.write_idx(tmp_path, making.pixels(20, 1), np.arange(20) % 2, held_out=4, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes() + 256 * gzip.compress(bytes(2**24)))
    assert refusal("idx", tmp_path).startswith("ROOT/train-images-idx3-ubyte.gz ")


def test_idx_images_without_pixels_are_refused(tmp_path: Path):
    making.write_idx(tmp_path, np.zeros((20, 1, 0, 8)), np.arange(20) % 2, held_out=4)
    assert "train files" in refusal("idx", tmp_path)


def png(width: int, height: int) -> bytes:
    """Return a PNG file with little data whose header declares this size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [15_000, 2**31 - 1])
def test_an_image_of_too_many_pixels_is_refused(side: int):
    with pytest.raises(DistillKacError, match=r"^i .*178956970 pixels"):
        Decoder(size=8).shape_of(png(side, side), "i")


def test_an_image_that_is_too_long_to_be_resized_is_refused():
    image = np.zeros((3, 1, 20_000), np.uint8)
    with pytest.raises(DistillKacError, match=r"^i .*20000x1 .*`data\.size` 256"):
        Decoder(size=256).shape_of(making.encoded(image), "i")
    assert Decoder(size=8).shape_of(making.encoded(image), "i") == (3, 8, 8)


def test_a_parquet_footer_with_more_rows_than_the_file_can_hold_is_refused(tmp_path: Path):
    rows = 1_000_000
    image = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), [making.encoded(making.pixels(1)[0])])
    table = pa.table({"image": image.cast(pa.binary())})
    pq.write_table(table, tmp_path / "p.parquet", compression="zstd", row_group_size=rows)
    assert (tmp_path / "p.parquet").stat().st_size < rows
    assert "1,000,000 rows" in refusal("parquet", tmp_path, label_column=None)


def test_images_that_do_not_fit_on_the_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    making.write_folder(tmp_path, making.pixels(10), [0] * 10)
    usage = namedtuple("usage", "free")
    for free, fits in ((10 * 192 - 1, False), (10 * 192, True)):
        monkeypatch.setattr(decoded.shutil, "disk_usage", lambda path, free=free: usage(free))
        if fits:
            assert open_dataset(DataConfig(kind="folder", root=str(tmp_path))).description.train == 8
        else:
            message = refusal("folder", tmp_path)
            assert message.startswith(f"{cache_folder('data')}: 10 images of 8x8 ")
            assert "DISTILLKAC_CACHE" in message


def test_a_file_that_is_larger_than_its_archive_is_refused(tmp_path: Path):
    """A sparse file in a tar archive can have any size."""
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.pax_headers = {"GNU.sparse.size": str(2**40), "GNU.sparse.map": "0,0", "GNU.sparse.major": "0"}
        archive.addfile(member)
    message = refusal("cifar10", tmp_path)
    assert "data_batch_1" in message
    assert f"{2**40:,} bytes" in message


def frames(ending: str) -> bytes:
    """Return three images in one file. The first is black."""
    pictures = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 100, 200)]
    sink = io.BytesIO()
    pictures[0].save(sink, ending, save_all=True, append_images=pictures[1:])
    return sink.getvalue()


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tiff"])
def test_a_file_of_several_images_is_refused(ending: str):
    with pytest.raises(DistillKacError, match=rf"^i contains 3 images.* {ending.upper()} file"):
        Decoder().shape_of(frames(ending), "i")


def test_the_preview_of_a_photograph_is_ignored():
    assert not Decoder().decode(frames("mpo"), "i", (3, 8, 8)).any()
