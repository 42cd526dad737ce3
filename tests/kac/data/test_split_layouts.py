"""File names decide which images are for training and which are held out. Ambiguous names are refused."""

from pathlib import Path

import numpy as np
import pytest

from kac.data import DataConfig, DataDescription, open_dataset
from kac.util.errors import DistillKacError
from tests.kac.data import making

IMAGES = [making.encoded(image) for image in making.pixels(40)]


def write_files(root: Path, paths: list[str]) -> Path:
    """For each path, write a Parquet file, an image or, if the path has no suffix, a folder of six images."""
    images = iter(IMAGES * 5)
    for path in paths:
        file = root / path
        if file.suffix == ".parquet":
            making.write_parquet(file, making.pixels(10), [0, 1] * 5)
            continue
        for image in [file] if file.suffix else [file / f"{i}.png" for i in range(6)]:
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(next(images))
    return root


def describe(root: Path, paths: list[str]) -> DataDescription:
    kind = "parquet" if paths[0].endswith(".parquet") else "folder"
    return open_dataset(DataConfig(kind=kind, root=str(write_files(root, paths)))).description


@pytest.mark.parametrize(
    ("paths", "train", "held_out", "train_from", "held_out_from"),
    [
        (["train/a", "train/b", "test/a"], 12, 6, "train/", "test/"),
        (["Training/a", "VALIDATION/a"], 6, 6, "Training/", "VALIDATION/"),
        (["train/a", "val/a"], 6, 6, "train/", "val/"),
        (["train/a", "valid/a"], 6, 6, "train/", "valid/"),
        (["train/a", "dev/a"], 6, 6, "train/", "dev/"),
        (["train/a", "eval/a"], 6, 6, "train/", "eval/"),
        (["train2017/a", "val2017/a"], 6, 6, "train2017/", "val2017/"),
        (["my-train-set/a", "testset/a"], 6, 6, "my-train-set/", "testset/"),
        (["trainA/a", "testA/a"], 6, 6, "trainA/", "testA/"),
        (["all/train/a", "all/test/a"], 6, 6, "all/train/", "all/test/"),
        (["seg_train/seg_train/a", "seg_test/seg_test/a"], 6, 6, "seg_train/", "seg_test/"),
        (["a/train", "a/test", "b/train"], 12, 6, "a/train/, b/train/", "a/test/"),
        (["a/train_1.png", "b/train_2.png", "a/test_1.png"], 2, 1, "train*", "test*"),
        (["train/bed", "train/train", "test/train"], 12, 6, "train/", "test/"),
        (["default/train/0.parquet", "default/test/0.parquet"], 10, 10, "default/train/", "default/test/"),
        (["partial-train/0.parquet", "test/0.parquet"], 10, 10, "partial-train/", "test/"),
        (["split=train/0.parquet", "split=validation/0.parquet"], 10, 10, "split=train/", "split=validation/"),
        (
            ["train-0-of-2.parquet", "train-1-of-2.parquet", "val.parquet"],
            20,
            10,
            "train-0-of-2.parquet",
            "val.parquet",
        ),
        (["mnist_train.parquet", "mnist_test.parquet"], 10, 10, "mnist_train.parquet", "mnist_test.parquet"),
        (["train_no_test.parquet", "test-0.parquet"], 10, 10, "train_no_test.parquet", "test-0.parquet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_split_is_named_by_a_word_anywhere_in_the_path(
    tmp_path: Path, paths: list[str], train: int, held_out: int, train_from: str, held_out_from: str
):
    description = describe(tmp_path, paths)
    assert (description.train, description.held_out) == (train, held_out)
    train_text, held_out_text = description.split.split(", held-out images from ")
    assert train_text.startswith(f"training images from {train_from}")
    assert held_out_text.startswith(held_out_from)


@pytest.mark.parametrize("ending", ["", "/0.parquet"], ids=["folder", "parquet"])
def test_with_a_test_split_the_validation_split_is_not_used(tmp_path: Path, ending: str):
    paths = [f"{part}/a{ending}" for part in ("train", "test", "val")]
    three, two = describe(tmp_path / "3", paths), describe(tmp_path / "2", paths[:2])
    assert three.sha256 == two.sha256
    assert "val/" in three.split
    assert "not used" in three.split


@pytest.mark.parametrize(
    "paths",
    [["train_station", "airport"], ["bullet train"], ["a/train.png", "a/1.png", "a/2.png", "a/3.png", "a/test.png"]],
    ids=" ".join,
)
def test_the_name_of_a_split_inside_a_longer_name_or_in_image_names_is_ignored(tmp_path: Path, paths: list[str]):
    description = describe(tmp_path, paths)
    total = description.train + description.held_out
    assert description.held_out == total // 5 if len(paths) == 5 else total // 6
    assert description.split.startswith("every fifth image of each class is held out")


@pytest.mark.parametrize("paths", [["train/a"], ["train-0.parquet", "train-1.parquet"], ["0.parquet", "1.parquet"]])
def test_without_a_held_out_split_every_fifth_image_is_held_out(tmp_path: Path, paths: list[str]):
    description = describe(tmp_path, paths)
    assert description.held_out == (description.train + description.held_out) // 5
    assert description.split.startswith("every fifth image of each class is held out")
    assert (paths[0].partition("/")[0] in description.split) == paths[0].startswith("train")


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (["train/a", "extra/a"], ["extra/a", "train/a"]),
        (["train/a", "unsupervised/a"], ["unsupervised/a", "train/a"]),
        (["train/a", "test/1.png"], ["test", "train/a"]),
        (["seg_train/a", "seg_pred/seg_pred"], ["seg_pred/seg_pred", "seg_train/a"]),
        (["train", "car"], ["car, train"]),
        (["a/train", "b/holdout"], ["b/holdout", "a/train"]),
        (["train", "test"], ["test, train"]),
        (["train"], ["train "]),
        (["val"], ["val "]),
        (["train2017", "val2017"], ["train2017, val2017"]),
        (["trainA", "trainB", "testA", "testB"], ["testA, testB, trainA"]),
        (["train/train", "test/test"], ["test/test, train/train"]),
        (["train/test/a"], ["train/test/a", "train and test"]),
        (["a/b", "a/c"], ["a/b"]),
        (["train/pets/cat", "train/wild/lion"], ["train/pets/cat", "train/wild/lion"]),
        (["test/a", "val/a"], ["test", "validation", "nothing to train on"]),
        (["train-0.parquet", "extra-0.parquet"], ["train-0.parquet", "extra-0.parquet"]),
        (["train-0.parquet", "unsupervised/0.parquet"], ["train-0.parquet", "unsupervised/0.parquet"]),
        (["train/test-0.parquet"], ["train/test-0.parquet", "train and test"]),
        (["mnist-train-test.parquet"], ["mnist-train-test.parquet", "train and test"]),
        (["test-0.parquet"], ["test-0.parquet", "nothing to train on"]),
    ],
    ids=" ".join,
)
def test_ambiguous_names_are_refused_and_named(tmp_path: Path, paths: list[str], named: list[str]):
    with pytest.raises(DistillKacError) as raised:
        describe(tmp_path, paths)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}: ")
    assert "\n" not in message
    for name in named:
        assert name in message


def test_the_name_of_a_single_file_does_not_matter(tmp_path: Path):
    path = making.write_parquet(tmp_path / "test-0.parquet", making.pixels(10), [0] * 10)
    found = open_dataset(DataConfig(kind="parquet", root=str(path))).description
    assert (found.train, found.held_out) == (8, 2)


def test_files_of_operating_systems_are_ignored(tmp_path: Path):
    write_files(tmp_path, ["a", "b"])
    before = open_dataset(DataConfig(kind="folder", root=str(tmp_path))).description
    for path in ("Thumbs.db", "a/desktop.ini", "a/.DS_Store", "__MACOSX/a/._0.png", "__MACOSX/0.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"no image")
    open_dataset.cache_clear()
    assert open_dataset(DataConfig(kind="folder", root=str(tmp_path))).description == before


def test_idx_files_may_have_dots_in_their_names(tmp_path: Path):
    making.write_idx(tmp_path, making.pixels(60, 1), np.arange(60) % 3, held_out=12, packed=True)
    before = open_dataset(DataConfig(kind="idx", root=str(tmp_path))).description
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    open_dataset.cache_clear()
    found = open_dataset(DataConfig(kind="idx", root=str(tmp_path))).description
    assert found.sha256 == before.sha256
    assert "train-images.idx3-ubyte.gz" in found.split
