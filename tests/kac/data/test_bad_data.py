"""Bad data are refused with one line that names the file, before anything is written to the cache."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kac.data import DataConfig, open_dataset
from kac.util.cache import cache_folder
from kac.util.errors import ArgumentError, DistillKacError
from tests.kac.data import making


def refusal(kind: str, root: Path, **options) -> str:
    """Return the error message with ROOT instead of the folder, and check that nothing is left in the cache."""
    with pytest.raises(DistillKacError) as raised:
        open_dataset(DataConfig(kind=kind, root=str(root), **options))
    message = str(raised.value)
    assert "\n" not in message
    assert not [name for name in os.listdir(cache_folder("data")) if name.startswith(".")]
    return message.replace(f"{root}", "ROOT")


@pytest.fixture(autouse=True)
def data_cache() -> None:
    os.makedirs(cache_folder("data"), exist_ok=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of one class."""
    return making.write_folder(tmp_path / "images", making.pixels(10), [0] * 10)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    return making.write_idx(tmp_path / "idx", making.pixels(20, 1), np.arange(20) % 2, held_out=4)


@pytest.fixture
def batches() -> dict[str, bytes]:
    return making.cifar_batches(making.pixels(60, 3, 32), np.arange(60) % 10)


def test_a_damaged_image_is_named(folder: Path):
    image = folder / "a" / "00007.png"
    image.write_bytes(image.read_bytes()[:60])
    assert refusal("folder", folder).startswith("ROOT/a/00007.png ")
    image.write_bytes(b"<html>404</html>")
    message = refusal("folder", folder)
    assert message.startswith("ROOT/a/00007.png ")
    assert "16 bytes" in message


def test_images_of_different_sizes_are_refused(folder: Path):
    (folder / "a" / "00003.png").write_bytes(making.encoded(making.pixels(1, 3, 12)[0]))
    message = refusal("folder", folder)
    assert message.startswith("ROOT/a/00003.png ")
    assert all(value in message for value in ("12x12", "8x8", "`data.size`"))


def test_a_greyscale_image_among_rgb_images_is_refused(folder: Path):
    (folder / "a" / "00003.png").write_bytes(making.encoded(making.pixels(1, 1)[0]))
    message = refusal("folder", folder)
    assert message.startswith("ROOT/a/00003.png is greyscale")
    assert "`data.channels`" in message


def test_transparency_and_16_bits_are_refused(folder: Path):
    image = folder / "a" / "00003.png"
    image.write_bytes(making.encoded(making.pixels(1, 4)[0]))
    message = refusal("folder", folder)
    assert message.startswith("ROOT/a/00003.png ")
    assert "RGBA" in message
    image.write_bytes(making.encoded(making.pixels(1, 1)[0].astype(np.uint16)))
    message = refusal("folder", folder, channels=3)
    assert message.startswith("ROOT/a/00003.png ")
    assert "8 bits" in message


def test_an_empty_or_missing_folder_is_refused(tmp_path: Path, folder: Path):
    (tmp_path / "empty").mkdir()
    assert refusal("folder", tmp_path / "empty").startswith("ROOT is empty")
    (folder / "b").mkdir()
    assert refusal("folder", folder).startswith("ROOT/b/ ")
    assert refusal("folder", folder / "c").startswith("ROOT")


def test_images_without_a_class_folder_or_too_deep_are_refused(folder: Path):
    assert refusal("folder", folder / "a").startswith("ROOT/00000.png is not in a class folder")
    making.write_folder(folder / "pets", making.pixels(1), [0])
    assert "pets/a" in refusal("folder", folder)


def test_a_file_that_is_not_an_image_is_refused(folder: Path):
    (folder / "a" / "labels.csv").write_text("0")
    assert refusal("folder", folder).startswith("ROOT/a/labels.csv ")


def test_a_class_without_training_images_is_refused(tmp_path: Path):
    making.write_folder(tmp_path / "train", making.pixels(2), [0, 1])
    making.write_folder(tmp_path / "test", making.pixels(2), [0, 2])
    assert "'c' has held-out images (test/c/00001.png)" in refusal("folder", tmp_path)


def test_too_few_images_to_hold_any_out_are_refused(tmp_path: Path):
    making.write_folder(tmp_path, making.pixels(4), [0] * 4)
    assert "at most 4 images per class" in refusal("folder", tmp_path)


def test_missing_truncated_or_wrong_idx_files_are_named(mnist: Path):
    labels, images = mnist / "t10k-labels-idx1-ubyte", mnist / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-5])
    message = refusal("idx", mnist)
    assert message.startswith("ROOT/train-images-idx3-ubyte ")
    assert "1,035 bytes" in message
    images.write_bytes(b"\x00\x00\x0d\x03" + whole[4:])
    message = refusal("idx", mnist)
    assert message.startswith("ROOT/train-images-idx3-ubyte ")
    assert "00000d03" in message
    images.unlink()
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-9])
    assert refusal("idx", mnist).startswith("ROOT/train-images-idx3-ubyte.gz ")
    labels.unlink()
    message = refusal("idx", mnist)
    assert "no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz" in message
    assert "only t10k-images-idx3-ubyte, train-images-idx3-ubyte.gz, train-labels-" in message


def test_idx_labels_that_do_not_match_the_images_are_refused(mnist: Path):
    labels = mnist / "train-labels-idx1-ubyte"
    labels.write_bytes(making.idx_bytes(np.arange(15) % 2))
    assert "train files have 16 images and 15 labels" in refusal("idx", mnist)
    labels.write_bytes(making.idx_bytes(np.array([0, 1] * 7 + [0, 7])))
    assert "no training images of class 2" in refusal("idx", mnist)


def test_the_message_for_a_bad_archive_has_the_published_md5(tmp_path: Path, batches: dict[str, bytes]):
    archive = tmp_path / "cifar-10-python.tar.gz"
    making.write_archive(archive, batches)
    archive.write_bytes(archive.read_bytes()[:-1000])
    assert refusal("cifar10", archive).endswith("md5 is c58f30108f718f92721af3b95e74349a.")
    making.write_archive(archive, {name: batches[name] for name in batches if name != "data_batch_4"})
    assert "data_batch_4" in refusal("cifar10", archive)
    archive.write_bytes(b"no archive")
    assert refusal("cifar10", archive).startswith("ROOT ")
    archive.unlink()
    (tmp_path / "something").write_bytes(b"")
    message = refusal("cifar10", tmp_path)
    assert all(name in message for name in ("ROOT", "cifar-10-python.tar.gz", "cifar-10-batches-py"))


class PickledCall:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, call, *arguments) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("call", "name"),
    [(os.system, f"{os.name}.system"), (eval, "__builtin__.eval"), (np.load, "numpy.load")],
    ids=["os", "builtins", "numpy"],
)
def test_code_in_a_pickle_is_not_run(tmp_path: Path, batches: dict[str, bytes], call, name: str):
    victim = tmp_path / "victim"
    batches["data_batch_2"] = pickle.dumps({b"data": PickledCall(call, f"touch {victim}"), b"labels": []}, protocol=2)
    archive = making.write_archive(tmp_path / "cifar-10-python.tar.gz", batches)
    message = refusal("cifar10", archive)
    assert message.startswith("ROOT: data_batch_2 ")
    assert name in message
    assert not victim.exists()


def test_cifar_labels_that_do_not_match_the_images_are_refused(tmp_path: Path):
    images, labels = making.pixels(60, 3, 32), np.arange(60) % 10
    labels[7] = 10
    archive = making.write_archive(tmp_path / "c.tar.gz", making.cifar_batches(images, labels))
    assert "the label 10" in refusal("cifar10", archive)
    short = pickle.dumps({b"data": images[:10].reshape(10, -1), b"labels": [0] * 9}, protocol=2)
    making.write_archive(archive, {**making.cifar_batches(images, labels), "data_batch_1": short})
    assert "10 images, but 9 labels" in refusal("cifar10", archive)


def test_a_missing_column_of_a_parquet_file_is_named(tmp_path: Path):
    path = making.write_parquet(tmp_path / "p.parquet", making.pixels(10), [0] * 10)
    message = refusal("parquet", tmp_path, image_column="img")
    assert message.startswith("ROOT/p.parquet has no column 'img'")
    assert "`data.image_column`" in message
    assert "image: struct" in message
    assert "no column 'label' of encoded images" in refusal("parquet", tmp_path, image_column="label")
    message = refusal("parquet", tmp_path, label_column="image")
    assert "no column 'image' of integer labels" in message
    assert "`data.label_column`" in message
    path.write_bytes(path.read_bytes()[:-4])
    assert refusal("parquet", tmp_path).startswith("ROOT/p.parquet ")


def test_bad_values_in_parquet_files_are_refused(tmp_path: Path):
    path = tmp_path / "p.parquet"
    making.write_parquet(path, making.pixels(10), [0] * 9 + [-1])
    assert refusal("parquet", tmp_path).startswith("ROOT/p.parquet has the label -1")
    making.write_parquet(path, making.pixels(10), [0] * 9 + [None])
    assert "p.parquet has rows without a label (1)" in refusal("parquet", tmp_path)
    images = [making.encoded(image) for image in making.pixels(10)]
    images[7] = None
    pq.write_table(pa.table({"image": images, "label": [0] * 10}), path, row_group_size=5)
    assert "p.parquet: row 2 of row group 1 has no image bytes" in refusal("parquet", tmp_path)
    images[7] = b"nothing"
    pq.write_table(pa.table({"image": images, "label": [0] * 10}), path, row_group_size=5)
    message = refusal("parquet", tmp_path)
    assert "p.parquet: row 2 of row group 1 " in message
    assert "7 bytes" in message


def test_a_folder_without_parquet_files_or_rows_is_refused(tmp_path: Path):
    assert "empty" in refusal("parquet", tmp_path)
    (tmp_path / "train.zip").write_bytes(b"PK")
    assert "only train.zip." in refusal("parquet", tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "data-00000-of-00001.arrow").write_bytes(b"")
    assert "Arrow" in refusal("parquet", tmp_path)
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), tmp_path / "p.parquet"
    )
    assert "no rows" in refusal("parquet", tmp_path)
    assert refusal("parquet", tmp_path / "train.zip").endswith("unpack archives first.")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("size", {"kind": "idx", "root": "/d", "size": 32}),
        ("horizontal_flip", {"kind": "moons", "horizontal_flip": True}),
        ("label_column", {"kind": "folder", "root": "/d", "label_column": None}),
        ("root", {"kind": "folder"}),
        ("channels", {"kind": "folder", "root": "/d", "channels": 2}),
    ],
)
def test_options_without_effect_are_refused(option: str, values: dict):
    with pytest.raises(ArgumentError) as error:
        DataConfig(**values)
    assert error.value.name == option
