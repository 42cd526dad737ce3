"""Bad data are refused before any work: one line that says what was expected, what was found and what to do."""

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
    """The one line, without the folder; nothing is left in the cache."""
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


def test_a_corrupt_image_is_named(folder: Path):
    image = folder / "a" / "00007.png"
    image.write_bytes(image.read_bytes()[:60])
    found = refusal("folder", folder)
    assert found.startswith("ROOT/a/00007.png: expected an image, found ")
    assert found.endswith("replace or remove it")
    image.write_bytes(b"<html>404</html>")
    assert refusal("folder", folder).startswith("ROOT/a/00007.png: expected an image, found 16 bytes that are none")


def test_mixed_sizes(folder: Path):
    (folder / "a" / "00003.png").write_bytes(making.encoded(making.pixels(1, 3, 12)[0]))
    expected = "ROOT/a/00003.png: expected 8x8 as in the first image, found 12x12: `data.size` 8 crops and resizes"
    assert refusal("folder", folder).startswith(expected)


def test_greyscale_where_the_first_image_is_rgb(folder: Path):
    (folder / "a" / "00003.png").write_bytes(making.encoded(making.pixels(1, 1)[0]))
    expected = "ROOT/a/00003.png: expected RGB as in the first image, found greyscale: `data.channels` 3 makes every"
    assert refusal("folder", folder).startswith(expected)


def test_transparency_and_deep_grey(folder: Path):
    image = folder / "a" / "00003.png"
    image.write_bytes(making.encoded(making.pixels(1, 4)[0]))
    assert "a/00003.png: expected greyscale or RGB, found Pillow's mode RGBA" in refusal("folder", folder)
    image.write_bytes(making.encoded(making.pixels(1, 1)[0].astype(np.uint16)))
    assert "a/00003.png: expected 8 bits a channel, found" in refusal("folder", folder, channels=3)


def test_an_empty_folder(tmp_path: Path, folder: Path):
    (tmp_path / "empty").mkdir()
    assert "expected images in folders named by their class, found an empty" in refusal("folder", tmp_path / "empty")
    (folder / "b").mkdir()
    assert refusal("folder", folder).startswith("ROOT/b/: expected images in this folder, found none")
    assert refusal("folder", folder / "c") == "ROOT: expected a file or folder, found none"


def test_images_without_classes_and_folders_too_deep(folder: Path):
    assert refusal("folder", folder / "a").startswith("ROOT/00000.png: found an image that is in no class folder")
    making.write_folder(folder / "pets", making.pixels(1), [0])
    assert refusal("folder", folder).startswith("ROOT: found images in pets/a, which is too deep")


def test_files_that_are_no_images(folder: Path):
    (folder / "a" / "labels.csv").write_text("0")
    assert refusal("folder", folder).startswith("ROOT/a/labels.csv: expected images alone")


def test_test_images_of_a_class_that_is_not_trained(tmp_path: Path):
    making.write_folder(tmp_path / "train", making.pixels(2), [0, 1])
    making.write_folder(tmp_path / "test", making.pixels(2), [0, 2])
    assert refusal("folder", tmp_path).startswith("ROOT: found held-out images of the class 'c' (test/c/00001.png)")


def test_too_few_images_to_hold_some_out(tmp_path: Path):
    making.write_folder(tmp_path, making.pixels(4), [0] * 4)
    assert "expected 5 images of a class or more, so that every fifth can be held out, found 4" in refusal(
        "folder", tmp_path
    )


def test_idx_files_that_are_missing_cut_short_or_something_else(mnist: Path):
    labels, images = mnist / "t10k-labels-idx1-ubyte", mnist / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-5])
    assert refusal("idx", mnist).startswith("ROOT/train-images-idx3-ubyte: the header names 16 x 8 x 8 values")
    images.write_bytes(b"\x00\x00\x0d\x03" + whole[4:])
    assert "expected IDX bytes of 3 dimensions, which begin with 00000803, found 00000d03" in refusal("idx", mnist)
    images.unlink()
    (mnist / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-9])
    assert refusal("idx", mnist).startswith("ROOT/train-images-idx3-ubyte.gz: expected a whole gzip file")
    labels.unlink()
    found = refusal("idx", mnist)
    assert "t10k-labels-idx1-ubyte.gz, found t10k-images-idx3-ubyte, train-images-idx3-ubyte.gz, train-labels-" in found


def test_idx_labels_that_do_not_fit(mnist: Path):
    labels = mnist / "train-labels-idx1-ubyte"
    labels.write_bytes(making.idx_bytes(np.arange(15) % 2))
    assert refusal("idx", mnist) == "ROOT: expected a label for each train image, found 16 images and 15 labels"
    labels.write_bytes(making.idx_bytes(np.array([0, 1] * 7 + [0, 7])))
    assert "expected training images of each class 0 .. 7, found none of class 2" in refusal("idx", mnist)


def test_a_wrong_archive_says_what_the_published_one_hashes_to(tmp_path: Path, batches: dict[str, bytes]):
    archive = tmp_path / "cifar-10-python.tar.gz"
    making.write_archive(archive, batches)
    archive.write_bytes(archive.read_bytes()[:-1000])
    assert refusal("cifar10", archive).endswith("again, its md5 is c58f30108f718f92721af3b95e74349a")
    making.write_archive(archive, {name: batches[name] for name in batches if name != "data_batch_4"})
    assert "data_batch_4" in refusal("cifar10", archive)
    archive.write_bytes(b"no archive")
    assert refusal("cifar10", archive).startswith("ROOT: expected a whole gzip file, found: ")
    archive.unlink()
    expected = "ROOT: expected cifar-10-python.tar.gz, or its folder cifar-10-batches-py with all six batches, found"
    (tmp_path / "something").write_bytes(b"")
    assert refusal("cifar10", tmp_path).startswith(expected)


class Mischief:
    """Pickles to a call."""

    def __init__(self, call, *arguments) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("call", "name"),
    [(os.system, f"{os.name}.system"), (eval, "__builtin__.eval"), (np.load, "numpy.load")],
    ids=["os", "builtins", "numpy"],
)
def test_a_pickle_that_would_run_code_runs_nothing(tmp_path: Path, batches: dict[str, bytes], call, name: str):
    victim = tmp_path / "made"
    batches["data_batch_2"] = pickle.dumps({b"data": Mischief(call, f"touch {victim}"), b"labels": []}, protocol=2)
    archive = making.write_archive(tmp_path / "cifar-10-python.tar.gz", batches)
    found = refusal("cifar10", archive)
    expected = f"ROOT: data_batch_2: expected numbers alone, found a pickle that asks for {name}, which may run code"
    assert found.startswith(expected)
    assert not victim.exists()


def test_cifar_labels_that_do_not_fit(tmp_path: Path):
    images, labels = making.pixels(60, 3, 32), np.arange(60) % 10
    labels[7] = 10
    archive = making.write_archive(tmp_path / "c.tar.gz", making.cifar_batches(images, labels))
    assert "expected labels in 0 .. 9, found 10" in refusal("cifar10", archive)
    short = pickle.dumps({b"data": images[:10].reshape(10, -1), b"labels": [0] * 9}, protocol=2)
    making.write_archive(archive, {**making.cifar_batches(images, labels), "data_batch_1": short})
    assert "data_batch_1: expected a label for each image, found 10 images and 9 labels" in refusal("cifar10", archive)


def test_parquet_without_its_columns(tmp_path: Path):
    path = making.write_parquet(tmp_path / "p.parquet", making.pixels(10), [0] * 10)
    expected = "p.parquet: expected a column 'img' of encoded images, binary or a struct with bytes, found image: "
    assert expected in refusal("parquet", tmp_path, image_column="img")
    assert "expected a column 'label' of encoded images" in refusal("parquet", tmp_path, image_column="label")
    found = refusal("parquet", tmp_path, label_column="image")
    assert "expected a column 'image' of integers, found image: struct" in found
    assert found.endswith("`data.label_column` names another; None: no classes")
    path.write_bytes(path.read_bytes()[:-4])
    assert "p.parquet: expected Parquet, found: " in refusal("parquet", tmp_path)


def test_parquet_with_bad_values(tmp_path: Path):
    path = tmp_path / "p.parquet"
    making.write_parquet(path, making.pixels(10), [0] * 9 + [-1])
    assert refusal("parquet", tmp_path).startswith("ROOT/p.parquet: found the label -1")
    making.write_parquet(path, making.pixels(10), [0] * 9 + [None])
    assert "p.parquet: expected a label for each image, found 1 without" in refusal("parquet", tmp_path)
    images = [making.encoded(image) for image in making.pixels(10)]
    images[7] = None
    pq.write_table(pa.table({"image": images, "label": [0] * 10}), path, row_group_size=5)
    assert "p.parquet: row 2 of row group 1: expected the bytes of an image, found none" in refusal("parquet", tmp_path)
    images[7] = b"nothing"
    pq.write_table(pa.table({"image": images, "label": [0] * 10}), path, row_group_size=5)
    assert "p.parquet: row 2 of row group 1: expected an image, found 7 bytes" in refusal("parquet", tmp_path)


def test_parquet_files_that_are_none_or_empty(tmp_path: Path):
    assert "expected Parquet files with images, found an empty folder" in refusal("parquet", tmp_path)
    (tmp_path / "train.zip").write_bytes(b"PK")
    assert refusal("parquet", tmp_path).endswith("found none, only train.zip")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "data-00000-of-00001.arrow").write_bytes(b"")
    assert "found Arrow files, as datasets.save_to_disk writes them" in refusal("parquet", tmp_path)
    pq.write_table(
        pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), tmp_path / "p.parquet"
    )
    assert "expected Parquet files with images, found no rows" in refusal("parquet", tmp_path)
    assert refusal("parquet", tmp_path / "train.zip").endswith("unpack archives first")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "idx", "root": "/d", "size": 32}, r"`size`: expected none, since it means nothing for idx, found 32"),
        ({"kind": "moons", "horizontal_flip": True}, r"`horizontal_flip`: expected none, .* for moons, found True"),
        ({"kind": "folder", "root": "/d", "label_column": None}, r"`label_column`: expected none, .* for folder"),
        ({"kind": "folder"}, r"`root`: expected where the files of folder are, a path or s3:// URI, found none"),
        ({"kind": "folder", "root": "/d", "channels": 2}, r"`channels`: input should be 1 or 3, found 2"),
    ],
)
def test_options_that_mean_nothing_are_refused(values: dict, message: str):
    with pytest.raises(ArgumentError, match=message):
        DataConfig(**values)
