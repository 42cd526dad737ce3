"""Data of kind ``outside``: the arrays that a factory returns, and errors about factories and arrays."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from jobs.parsing import parse
from kac.data import ArrayData, DataConfig, Dataset, all_rows, begin_decoding, open_dataset
from kac.model import learned_data, load_config, save_model, teacher_config
from kac.networks import MLPConfig, build_network
from kac.path import PathConfig
from kac.util.errors import ArgumentError, DistillKacError
from kac.util.fingerprint import hashed_values
from kac.util.images import to_bytes
from pipeline.config import TeachSpec
from tests.kac.data import outside_data
from tests.kac.data.outside_data import COUNT, IMAGES, LABELS, POINTS

HERE = "tests.kac.data.outside_data"


def config(name: str, **options: Any) -> DataConfig:
    return DataConfig(kind="outside", factory=f"{HERE}:{name}", **options)


def check(data: Dataset, images: np.ndarray, held_out: np.ndarray) -> None:
    """Compare both splits with the images and with ``LABELS``."""
    for split, chosen in ((data.train, ~held_out), (data.held_out, held_out)):
        found = all_rows(split)
        assert (found.images.dtype, found.labels.dtype) == (torch.float32, torch.int64)
        values = to_bytes(found.images) if images.ndim == 4 else found.images
        np.testing.assert_array_equal(values.numpy(), images[: len(held_out)][chosen])
        np.testing.assert_array_equal(found.labels.numpy(), LABELS[: len(held_out)][chosen])


def every_fifth(count: int) -> np.ndarray:
    return np.arange(count) // 3 % 5 == 4  # the three classes alternate


@pytest.mark.parametrize(("name", "expected"), [("images", IMAGES), ("points", POINTS)])
def test_a_fifth_of_each_class_is_held_out(name: str, expected: np.ndarray):
    data = open_dataset(config(name))
    check(data, expected, every_fifth(COUNT))
    assert data.description.sample_shape == expected.shape[1:]
    assert data.description.num_classes == 3
    assert data.description.class_names == ()
    assert begin_decoding(config(name)) is None


def test_arguments_held_out_images_and_class_names_are_used():
    data = open_dataset(config("named", arguments={"held_out": 12}))
    check(data, IMAGES, np.arange(COUNT) >= 48)
    assert data.description.class_names == ("cat", "dog", "fish")
    check(open_dataset(config("images", arguments={"count": 30})), IMAGES, every_fifth(30))


def test_the_hash_depends_on_the_content_and_not_on_the_factory(monkeypatch: pytest.MonkeyPatch):
    def sha256(data: ArrayData) -> str:
        monkeypatch.setattr(outside_data, "GIVEN", data)
        open_dataset.cache_clear()
        return open_dataset(config("given")).description.sha256

    original = open_dataset(config("images")).description.sha256
    assert sha256(ArrayData(torch.from_numpy(IMAGES), LABELS.astype(np.int8))) == original
    variants = [
        ArrayData(IMAGES[::-1], LABELS),
        ArrayData(IMAGES, LABELS[::-1]),
        ArrayData(IMAGES[:48], LABELS[:48], IMAGES[48:], LABELS[48:]),
    ]
    assert len({original, *map(sha256, variants)}) == 4


@pytest.mark.parametrize(
    "data",
    [
        ArrayData(np.asfortranarray(IMAGES), LABELS.astype(np.uint16)),
        ArrayData(np.broadcast_to(IMAGES[:1], IMAGES.shape), LABELS),  # read-only
        ArrayData(np.repeat(IMAGES, 3, axis=1), LABELS),
        ArrayData(torch.from_numpy(POINTS).bfloat16().requires_grad_(), LABELS),
        ArrayData(POINTS[:, [0, 1, 1]], np.zeros(COUNT, np.int32)),
    ],
    ids=["fortran", "read-only", "RGB", "bfloat16", "one class"],
)
@pytest.mark.filterwarnings("error")
def test_every_layout_of_arrays_is_read(data: ArrayData, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outside_data, "GIVEN", data)
    open_dataset.cache_clear()
    assert all_rows(open_dataset(config("given")).train).images.shape == (48, *data.images.shape[1:])


# Errors


def refusal(data: DataConfig) -> str:
    open_dataset.cache_clear()
    with pytest.raises(DistillKacError) as error:
        open_dataset(data)
    message = str(error.value)
    assert data.factory in message
    assert "`data." in message
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("name", "arguments", "found"),
    [
        ("nothing", {}, "has no attribute 'nothing'"),
        ("COUNT", {}, "ArrayData"),
        ("not_annotated", {}, "-> ArrayData"),
        ("mapping", {}, "-> ArrayData"),
        ("raises", {}, "RuntimeError: no data today"),
        ("images", {"size": 3}, "TypeError: images()"),
        ("given", {}, "NoneType"),
    ],
)
def test_a_bad_factory_is_refused(name: str, arguments: dict[str, Any], found: str):
    assert found in refusal(config(name, arguments=arguments))


def test_a_module_that_is_not_installed_is_named():
    assert "No module named 'no'" in refusal(DataConfig(kind="outside", factory="no.such:data"))


WITH_NAN = np.where(np.arange(COUNT)[:, None] == 7, np.float32("nan"), POINTS)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (ArrayData(IMAGES.tolist(), LABELS), "images as list"),
        (ArrayData(IMAGES, LABELS.tolist()), "labels as list"),
        (ArrayData(IMAGES, None), "labels as NoneType"),
        (ArrayData(IMAGES.astype(object), LABELS), "object"),
        (ArrayData(IMAGES.astype(np.float32), LABELS), "float32"),
        (ArrayData(IMAGES.astype(np.int64), LABELS), "int64"),
        (ArrayData(IMAGES.transpose(0, 2, 3, 1), LABELS), "[60, 8, 8, 1]"),
        (ArrayData(IMAGES[:, 0], LABELS), "[60, 8, 8]"),
        (ArrayData(IMAGES[:0], LABELS[:0]), "empty"),
        (ArrayData(IMAGES[:, :, :0], LABELS), "empty"),
        (ArrayData(POINTS[:, :1], LABELS), "[60, 1]"),
        (ArrayData((POINTS * 100).astype(np.int64), LABELS), "int64"),
        (ArrayData(POINTS[0, 0], LABELS), "float32"),
        (ArrayData(WITH_NAN, LABELS), "nan"),
        (ArrayData(POINTS * 3, LABELS), "[-1, 1]"),
        (ArrayData(IMAGES, LABELS.astype(np.float32)), "float32"),
        (ArrayData(IMAGES, LABELS > 0), "bool"),
        (ArrayData(IMAGES, np.eye(3, dtype=np.int64)[LABELS]), "[60, 3]"),
        (ArrayData(IMAGES, LABELS[:-1]), "[59]"),
        (ArrayData(IMAGES, LABELS - 1), "label -1"),
        (ArrayData(IMAGES, LABELS * 10**15), "label 2000000000000000"),
        (ArrayData(IMAGES, LABELS * 2), "class 1"),
        (ArrayData(IMAGES[:9], LABELS[:9]), "at most 3"),
        (ArrayData(IMAGES, LABELS, IMAGES), "held_out_labels"),
        (ArrayData(IMAGES, LABELS, IMAGES[:, :, :4], LABELS), "[60, 1, 4, 8]"),
        (ArrayData(IMAGES, LABELS, IMAGES[:0], LABELS[:0]), "empty held_out_images"),
        (ArrayData(IMAGES, LABELS, IMAGES, LABELS + 1), "class 3"),
        (ArrayData(IMAGES, LABELS, class_names="abc"), "abc"),
        (ArrayData(IMAGES, LABELS, class_names=["a", "b", "a"]), "'a', 'b', 'a'"),
        (ArrayData(IMAGES, LABELS, class_names=["a", "b", 3]), "3"),
        (ArrayData(IMAGES, LABELS, class_names=["a", "b"]), "label 2"),
        (ArrayData(IMAGES, LABELS, class_names=["a", "b", "c", "d"]), "class 3"),
    ],
)
def test_bad_arrays_are_refused(data: Any, found: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outside_data, "GIVEN", data)
    assert found in refusal(config("given"))


def test_only_images_can_be_mirrored():
    assert "data.horizontal_flip" in refusal(config("points", horizontal_flip=True))
    assert open_dataset(config("images", horizontal_flip=True)).description.train == 48


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("factory", {"kind": "outside"}),
        ("factory", {"kind": "outside", "factory": "no_colon"}),
        ("factory", {"kind": "digits", "factory": "a:b"}),
        ("arguments", {"kind": "folder", "root": "/d", "arguments": {"a": 1}}),
        ("arguments", {"kind": "outside", "factory": "a:b", "arguments": ("a",)}),
        ("root", {"kind": "outside", "factory": "a:b", "root": "/d"}),
        ("size", {"kind": "outside", "factory": "a:b", "size": 8}),
    ],
)
def test_wrong_options_are_refused(option: str, values: dict[str, Any]):
    with pytest.raises(ArgumentError) as error:
        DataConfig(**values)
    assert error.value.name == option


def test_arrays_instead_of_a_factory_are_refused_in_one_line():
    with pytest.raises(ArgumentError) as error:
        TeachSpec(out="o", data=ArrayData(IMAGES, LABELS))
    assert error.value.name == "data"
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


# Options, fingerprints, model folders


def test_the_command_line_gives_the_same_config_as_python():
    words = ["--data", "outside", "--data.factory", "a.b:make", "--data.arguments", "sizes=[1,2]", "name=abc"]
    found = parse(TeachSpec, ["--out", "o", *words], "prog").data
    assert found == DataConfig(kind="outside", factory="a.b:make", arguments={"sizes": [1, 2], "name": "abc"})
    assert hash(found) == hash(DataConfig(**found.model_dump()))


def test_only_the_content_identifies_the_data():
    """A teacher's fingerprint includes the hash of its data but not the factory, which is a location, like `root`."""
    assert hashed_values(config("images", arguments={"count": 3})) == {"kind": "outside"}


def saved(folder: Any) -> None:
    network = MLPConfig(width=8, depth=1)
    teacher = teacher_config(network, PathConfig(), config("named", arguments={"held_out": 12}))
    save_model(str(folder), teacher, build_network(network, (1, 8, 8), 3).state_dict())


def test_a_model_folder_names_the_factory(tmp_path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path)
    model = load_config(str(tmp_path))
    open_dataset.cache_clear()
    assert learned_data(str(tmp_path), model) is open_dataset(config("named", arguments={"held_out": 12}))
    assert model.class_names == ("cat", "dog", "fish")
    monkeypatch.setattr(outside_data, "IMAGES", 255 - IMAGES)
    open_dataset.cache_clear()
    with pytest.raises(DistillKacError, match=model.data_sha256[:12]):
        learned_data(str(tmp_path), model)
    open_dataset.cache_clear()


def test_a_model_folder_can_call_only_data_factories(tmp_path):
    """Otherwise the author of its config.json could run any function."""
    saved(tmp_path)
    values, trap = json.loads((tmp_path / "config.json").read_text()), tmp_path / "trap"
    values["data"] |= {"factory": "os:mkdir", "arguments": {"path": str(trap)}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ArgumentError, match="os:mkdir"):
        learned_data(str(tmp_path), load_config(str(tmp_path)))
    assert not trap.exists()
