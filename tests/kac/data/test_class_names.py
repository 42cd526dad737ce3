"""Class names: their order, how `labels` selects classes, and where the names come from."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kac.data import DataConfig, all_rows, folder, open_dataset
from kac.data.class_names import in_order, label_of, list_classes
from kac.model import learned_data, teacher_config
from kac.networks import MLPConfig
from kac.path import PathConfig
from kac.util.errors import ArgumentError, DistillKacError
from tests.kac.data import making

MONTHS = tuple(str(i) for i in range(1, 13))


@pytest.mark.parametrize(
    "names",
    [
        MONTHS,
        ("-10", "-9", "0", "1"),
        ("0.25", "0.5", "1", "10"),
        ("08", "9", "10"),
        ("c1", "c2", "c10"),
        ("1_cat", "2_dog", "10_eel"),
        ("v1.2", "v1.9", "v1.10"),
        ("B", "a", "b"),
        ("a-1", "a1", "a_1"),  # in the order of the characters' code points
        ("n01440764", "n02102040", "n10148035"),
        ("cat", "dog"),
        ("x1y2", "x1y10", "x2"),
        ("é1", "é10"),
        ("a", "a1", "aa"),
        (),
    ],
)
def test_classes_are_in_natural_order(names: tuple[str, ...]):
    assert in_order(reversed(names)) == list(names)


def test_names_without_numbers_are_in_the_order_of_their_characters():
    names = ["b", "A", "z z", "ab", "a b", "_", "Å", "a.b", "~", "-"]
    assert in_order(names) == sorted(names)


@pytest.mark.parametrize(
    ("word", "names", "label"),
    [
        ("dog", ("cat", "dog"), 1),
        ("1", ("cat", "dog"), 1),
        ("1", (), 1),
        ("1", MONTHS, 0),
        ("12", MONTHS, 11),
        ("0", ("0", "1"), 0),
        ("3", ("01", "02", "03"), 2),
        ("10", ("10", "2"), 0),
        ("other", ("1", "other"), 1),
        ("1", ("1", "other"), 0),
    ],
)
def test_a_word_is_a_name_or_a_label(word: str, names: tuple[str, ...], label: int):
    assert label_of(word, names, len(names) or 2) == label


@pytest.mark.parametrize(
    ("word", "names", "listed"),
    [
        ("0", MONTHS, "0=1, 1=2"),
        ("13", MONTHS, "11=12"),
        ("bird", ("cat", "dog"), "0=cat, 1=dog"),
        ("2", ("cat", "dog"), "0=cat, 1=dog"),
        ("-1", ("cat", "dog"), "0=cat, 1=dog"),
        ("0", ("1", "other"), "0=1, 1=other"),
        ("2", (), "0 .. 1"),
        ("cat", (), "0 .. 1"),
    ],
)
def test_an_unknown_class_is_refused_and_the_classes_are_listed(word: str, names: tuple[str, ...], listed: str):
    with pytest.raises(ArgumentError) as raised:
        label_of(word, names, len(names) or 2)
    assert raised.value.name == "labels"
    assert listed in str(raised.value)
    assert repr(word) in str(raised.value)


def test_a_list_of_many_classes_is_short():
    names = [f"n{i:08d}" for i in range(1000)]
    assert list_classes(names) == "0=n00000000, 1=n00000001, 2=n00000002, ..., 999=n00000999"
    assert len(list_classes(["x" * 255] * 1000)) < 500
    assert list_classes(["a\nb"]) == "0=a b"


def write_twelve_classes(root: Path) -> DataConfig:
    """Write the class folders 1 to 12 with five images each."""
    labels = np.repeat(np.arange(12), 5)
    making.write_folder(root, making.pixels(60), labels, names=MONTHS)
    return DataConfig(kind="folder", root=str(root))


def test_folders_with_numeric_names_are_labelled_by_value(tmp_path: Path):
    config = write_twelve_classes(tmp_path)
    data = open_dataset(config)
    assert data.description.class_names == MONTHS
    images, labels = all_rows(data.held_out)
    expected = dict(zip(MONTHS, making.pixels(60).reshape(12, 5, 3, 8, 8)[:, 4], strict=True))
    for image, label in zip(images, labels.tolist(), strict=True):
        found = ((image + 1) * 127.5).round().byte().numpy()
        assert np.array_equal(found, expected[MONTHS[label]])


def test_a_model_with_a_different_order_of_classes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = write_twelve_classes(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "in_order", sorted)
        patch.setenv("DISTILLKAC_CACHE", str(tmp_path / "other"))
        model = teacher_config(MLPConfig(width=8, depth=1), PathConfig(), config)
        assert model.class_names[1] == "10"
    open_dataset.cache_clear()
    with pytest.raises(DistillKacError, match=model.data_sha256[:12]):
        learned_data("m", model)
    now = teacher_config(MLPConfig(width=8, depth=1), PathConfig(), config)
    assert now.class_names == MONTHS
    assert learned_data("m", now).description.sha256 == now.data_sha256


def write_named(path: Path, names: object, labels: list[int]) -> Path:
    """Write a Parquet file whose label is a ClassLabel of Hugging Face."""
    making.write_parquet(path, making.pixels(len(labels)), labels)
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pq.read_table(path)
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def read_class_names(root: Path) -> tuple[str, ...]:
    return open_dataset(DataConfig(kind="parquet", root=str(root))).description.class_names


def test_class_names_come_from_the_metadata_of_hugging_face(tmp_path: Path):
    write_named(tmp_path / "train.parquet", ["eel", "cat", "10"], [0, 1, 2] * 5)
    making.write_parquet(tmp_path / "test.parquet", making.pixels(2), [0, 1])
    assert read_class_names(tmp_path) == ("eel", "cat", "10")


def test_names_after_the_last_class_with_images_are_left_out(tmp_path: Path):
    write_named(tmp_path / "a.parquet", ["cat", "dog", "eel"], [0, 1] * 5)
    assert read_class_names(tmp_path) == ("cat", "dog")


@pytest.mark.parametrize("metadata", [None, {b"huggingface": b"{"}, {b"huggingface": b'{"info": []}'}, {b"other": b""}])
def test_other_metadata_have_no_class_names(tmp_path: Path, metadata: dict[bytes, bytes] | None):
    path = making.write_parquet(tmp_path / "a.parquet", making.pixels(10), [0] * 10)
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)
    assert read_class_names(tmp_path) == ()


def test_inconsistent_class_names_are_refused(tmp_path: Path):
    train = write_named(tmp_path / "train.parquet", ["cat", "dog"], [0, 1] * 5)
    write_named(tmp_path / "test.parquet", ["dog", "cat"], [0, 1])
    with pytest.raises(DistillKacError, match=r"train\.parquet .*test\.parquet"):
        read_class_names(tmp_path)
    (tmp_path / "test.parquet").unlink()
    write_named(train, ["cat"], [0, 1] * 5)
    with pytest.raises(DistillKacError, match=r"train\.parquet .*\b1 class names"):
        read_class_names(tmp_path)
    write_named(train, ["cat", "cat"], [0, 1] * 5)
    with pytest.raises(DistillKacError, match=r"train\.parquet: .*distinct"):
        read_class_names(tmp_path)


def test_class_names_of_cifar10_come_from_its_meta_file_or_are_the_published_ones(tmp_path: Path):
    batches = making.cifar_batches(making.pixels(60, 3, 32), np.arange(60) % 10)
    archive = making.write_archive(tmp_path / "a.tar.gz", batches)
    config = DataConfig(kind="cifar10", root=str(archive))
    assert open_dataset(config).description.class_names[:2] == ("airplane", "automobile")
    batches["batches.meta"] = pickle.dumps({b"label_names": [f"c{i}".encode() for i in range(10)]}, 2)
    making.write_archive(archive, batches)
    open_dataset.cache_clear()
    assert open_dataset(config).description.class_names == tuple(f"c{i}" for i in range(10))
    batches["batches.meta"] = pickle.dumps({b"label_names": [b"a"]}, 2)
    making.write_archive(archive, batches)
    open_dataset.cache_clear()
    with pytest.raises(DistillKacError, match=r"batches\.meta .*\b1\b"):
        open_dataset(config)


def test_idx_files_have_no_class_names(tmp_path: Path):
    making.write_idx(tmp_path, making.pixels(20, 1), np.arange(20) % 2, held_out=4)
    assert open_dataset(DataConfig(kind="idx", root=str(tmp_path))).description.class_names == ()
