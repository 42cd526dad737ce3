"""Datasets in files are read as they were written, with the right split."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kac.data import DataConfig, Dataset, all_rows, decoded, encoded, open_dataset
from kac.data.encoded import Decoder
from kac.util.images import from_bytes, to_bytes
from tests.kac.data import making

PAIRS = np.arange(60) % 2
"""Labels of two alternating classes."""

EVERY_FIFTH = np.isin(np.arange(60), [8, 9, 18, 19, 28, 29, 38, 39, 48, 49, 58, 59])
"""Whether each image is held out: every fifth of each class in PAIRS."""


def read(data: Dataset) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the images (as bytes) and the labels of both splits."""
    parts = all_rows(data.train), all_rows(data.held_out)
    return [to_bytes(part.images).numpy() for part in parts], [part.labels.numpy() for part in parts]


def check(config: DataConfig, images: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> Dataset:
    """Open the dataset, check that it has these images and labels in this order, and return it."""
    data = open_dataset(config)
    found_images, found_labels = read(data)
    for i, which in enumerate((~held_out, held_out)):
        assert np.array_equal(found_images[i], images[which])
        assert np.array_equal(found_labels[i], labels[which])
    described = data.description
    assert described.sample_shape == images.shape[1:]
    assert (described.train, described.held_out) == ((~held_out).sum(), held_out.sum())
    assert (len(data.train), len(data.held_out)) == (described.train, described.held_out)
    counts = np.bincount(labels[~held_out], minlength=described.num_classes)
    assert described.class_frequencies == tuple((counts / counts.sum()).tolist())
    return data


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read(tmp_path: Path, packed: bool):
    images, labels = making.pixels(60, 1, 6), np.arange(60) % 3
    making.write_idx(tmp_path, images, labels, held_out=12, packed=packed)
    data = check(DataConfig(kind="idx", root=str(tmp_path)), images, labels, np.arange(60) >= 48)
    assert data.description.num_classes == 3


@pytest.mark.parametrize("protocol", [2, 5])
def test_the_archive_of_cifar10_and_its_extracted_folder_are_read(tmp_path: Path, protocol: int):
    images, labels = making.pixels(120, 3, 32), np.arange(120) % 10
    batches = making.cifar_batches(images, labels, protocol)
    archive = making.write_archive(tmp_path / "cifar-10-python.tar.gz", batches)
    extracted = tmp_path / "extracted" / "cifar-10-batches-py"
    extracted.mkdir(parents=True)
    for name, content in batches.items():
        (extracted / name).write_bytes(content)
    held_out = np.arange(120) >= 100
    roots = (archive, tmp_path, extracted, extracted.parent)
    hashes = {
        check(DataConfig(kind="cifar10", root=str(root)), images, labels, held_out).description.sha256 for root in roots
    }
    assert len(hashes) == 1


def test_a_folder_of_classes_is_read(tmp_path: Path):
    images = making.pixels(60)
    making.write_folder(tmp_path, images, PAIRS, names="ba")  # class 1 sorts first
    (tmp_path / ".hidden").write_text("no image")
    order = np.argsort(1 - PAIRS, kind="stable")  # a, then b
    held_out = np.arange(60) % 5 == 4
    check(DataConfig(kind="folder", root=str(tmp_path)), images[order], 1 - PAIRS[order], held_out)


def test_a_folder_with_train_and_test_is_read(tmp_path: Path):
    images = making.pixels(60, 1)
    making.write_folder(tmp_path / "test", images[:20], [0] * 20)
    making.write_folder(tmp_path / "train", images[20:], [0] * 30 + [1] * 10)
    labels = np.repeat([0, 1], [50, 10])
    check(DataConfig(kind="folder", root=str(tmp_path)), images, labels, np.arange(60) < 20)


def test_a_parquet_file_without_splits_is_read(tmp_path: Path):
    images = making.pixels(60)
    making.write_parquet(tmp_path / "data.parquet", images, PAIRS.tolist(), rows=7)
    check(DataConfig(kind="parquet", root=str(tmp_path / "data.parquet")), images, PAIRS, EVERY_FIFTH)


def test_parquet_files_with_splits_and_other_binary_columns_are_read(tmp_path: Path):
    images = making.pixels(60)
    named = {"picture": pa.array([making.encoded(image) for image in images]), "class": pa.array(PAIRS, pa.int32())}
    table = pa.table(named)
    pq.write_table(table.slice(0, 10), tmp_path / "test-00000-of-00001.parquet")
    pq.write_table(table.slice(10, 30), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(table.slice(40), tmp_path / "train-00001-of-00002.parquet")
    config = DataConfig(kind="parquet", root=str(tmp_path), image_column="picture", label_column="class")
    check(config, images, PAIRS, np.arange(60) < 10)


def test_a_parquet_file_without_labels_has_one_class(tmp_path: Path):
    images = making.pixels(60)
    making.write_parquet(tmp_path / "data.parquet", images, None)
    config = DataConfig(kind="parquet", root=str(tmp_path), label_column=None)
    assert check(config, images, 0 * PAIRS, np.arange(60) % 5 == 4).description.num_classes == 1


def test_the_same_images_have_the_same_hash_in_every_format(tmp_path: Path):
    images = making.pixels(60, 1)
    making.write_folder(tmp_path / "folder" / "train", images[:48], PAIRS[:48])
    making.write_folder(tmp_path / "folder" / "test", images[48:], PAIRS[48:])
    data = open_dataset(DataConfig(kind="folder", root=str(tmp_path / "folder")))
    (train, held_out), (train_labels, held_out_labels) = read(data)
    both, labels = np.concatenate([train, held_out]), np.concatenate([train_labels, held_out_labels])
    making.write_idx(tmp_path / "idx", both, labels, held_out=12)
    of_idx = open_dataset(DataConfig(kind="idx", root=str(tmp_path / "idx"))).description
    assert of_idx.sha256 == data.description.sha256


def test_the_hash_of_images_never_changes(tmp_path: Path):
    """The fingerprint of every teacher includes the hash of its data."""
    images, labels = np.arange(20 * 4).reshape(20, 1, 2, 2), np.arange(20) % 2
    making.write_idx(tmp_path, images, labels, held_out=4)
    data = open_dataset(DataConfig(kind="idx", root=str(tmp_path)))
    assert data.description.sha256 == "277c5971be02137627aa7a4bcb87601e5c4a39b8e21e38edac7c55c1679f3646"


@pytest.mark.parametrize(
    ("kind", "sha256"),
    [
        ("classes", "4d252853ea6e8d00cfa6851e032d6423f152a1aae5c4fde79072ef60079d6786"),
        ("splits", "9ef81f3aad9833a1b8fe410463be780e3129c76b441cbdb3041761332a4bf1ad"),
        ("one parquet", "760df6e3ec20c1323c7f79f693439a64ac32287a69e825ac2816265b4a9b01bd"),
        ("two parquet", "7c289b332722d629afeff3516f46c84746100af753899eb51f89636ae933fda5"),
        ("cifar10", "c98b6416e57ea9ed3e469ad64465c2912aa1fe9d67d23ee580ffa5de0cdb9039"),
    ],
)
def test_the_hash_of_each_layout_never_changes(tmp_path: Path, kind: str, sha256: str):
    """If a hash changed, models that were trained on such data would be refused."""
    ramp = (np.arange(60 * 3 * 32 * 32) % 251).astype(np.uint8).reshape(60, 3, 32, 32)
    images = ramp[:, :, :8, :8]
    if kind == "classes":
        making.write_folder(tmp_path, images, PAIRS)
    elif kind == "splits":
        making.write_folder(tmp_path / "train", images[:40], PAIRS[:40])
        making.write_folder(tmp_path / "test", images[40:], PAIRS[40:])
    elif kind == "one parquet":
        making.write_parquet(tmp_path / "x.parquet", images, PAIRS.tolist(), rows=7)
    elif kind == "two parquet":
        making.write_parquet(tmp_path / "train-0.parquet", images[:40], PAIRS[:40].tolist())
        making.write_parquet(tmp_path / "test-0.parquet", images[40:], PAIRS[40:].tolist())
    else:
        making.write_archive(tmp_path / "cifar-10-python.tar.gz", making.cifar_batches(ramp, np.arange(60) % 10))
    options = {"kind": "cifar10" if kind == "cifar10" else "parquet" if "parquet" in kind else "folder"}
    assert open_dataset(DataConfig(root=str(tmp_path), **options)).description.sha256 == sha256


def test_images_of_all_sizes_are_cropped_and_resized(tmp_path: Path):
    for i, (height, width) in enumerate([(32, 48), (40, 33), (64, 64), (16, 20), (90, 31)] * 2):
        image = np.zeros((3, height, width), np.uint8)
        left, top = (width - min(height, width)) // 2, (height - min(height, width)) // 2
        image[0, top : top + min(height, width), left : left + min(height, width)] = 200
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / f"{i}.png").write_bytes(making.encoded(image))
    data = open_dataset(DataConfig(kind="folder", root=str(tmp_path), size=16))
    assert data.description.sample_shape == (3, 16, 16)
    inner = to_bytes(all_rows(data.train).images)[:, 0, 2:-2, 2:-2]
    assert (inner.int() - 200).abs().max() <= 6  # the bicubic filter rings by a few grey levels


def test_large_images_are_halved_by_averages_before_the_bicubic_filter():
    image = making.pixels(1, 1, 64)[0]
    averages = image.reshape(1, 16, 4, 16, 4).astype(float).mean((2, 4))
    resized = Decoder(size=16).decode(making.encoded(image), "i", (1, 16, 16))
    assert np.abs(resized - averages).max() <= 2  # each of the two halvings rounds twice: along rows and along columns


def test_channels_are_converted_on_request(tmp_path: Path):
    grey, colour = making.pixels(5, 1), making.pixels(5, 3, seed=1)
    making.write_folder(tmp_path / "train", grey, [0] * 5)
    making.write_folder(tmp_path / "test", colour, [0] * 5)
    rgb = open_dataset(DataConfig(kind="folder", root=str(tmp_path), channels=3))
    (train, held_out), _ = read(rgb)
    assert np.array_equal(train, grey.repeat(3, 1))
    assert np.array_equal(held_out, colour)
    (train, held_out), _ = read(open_dataset(DataConfig(kind="folder", root=str(tmp_path), channels=1)))
    assert np.array_equal(train, grey)
    luma = (colour * np.array([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, keepdims=True)
    assert np.abs(held_out - luma).max() <= 1


@pytest.mark.parametrize("ending", ["jpg", "webp", "bmp", "gif"])
def test_other_formats_are_read(ending: str):
    image = np.full((3, 8, 8), 100, np.uint8)
    decoded = Decoder(channels=3).decode(making.encoded(image, ending), "i", (3, 8, 8))
    assert np.abs(decoded.astype(int) - 100).max() <= 2


def test_rows_are_in_the_requested_order_and_must_be_in_range(tmp_path: Path):
    images, labels = making.pixels(60, 1), np.arange(60) % 2
    making.write_idx(tmp_path, images, labels, held_out=12)
    split = open_dataset(DataConfig(kind="idx", root=str(tmp_path))).train
    rows = split.rows(torch.tensor([5, 0, 5, 47]))
    assert torch.equal(rows.images, from_bytes(torch.from_numpy(images[[5, 0, 5, 47]])))
    assert rows.images.dtype == torch.float32
    assert rows.labels.tolist() == [1, 0, 1, 1]
    with pytest.raises(IndexError):
        split.rows(torch.tensor([48]))


ORIENTATION = 0x0112
UPRIGHT = np.zeros((3, 12, 16), np.uint8)
"""An image with different sides: red at the top, green at the left."""
UPRIGHT[0, :4], UPRIGHT[1, :, :4] = 255, 255

SAVED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: lambda image: image[:, :, ::-1],
    3: lambda image: image[:, ::-1, ::-1],
    4: lambda image: image[:, ::-1],
    5: lambda image: image.transpose(0, 2, 1),
    6: lambda image: image.transpose(0, 2, 1)[:, ::-1],
    7: lambda image: image[:, ::-1, ::-1].transpose(0, 2, 1),
    8: lambda image: image.transpose(0, 2, 1)[:, :, ::-1],
}
"""How a camera saves the image at each EXIF orientation, according to the standard."""


@pytest.mark.parametrize("orientation", SAVED)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_images_are_turned_upright_before_they_are_cropped(ending: str, orientation: int):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 100, "exif": exif} if ending in {"jpg", "webp"} else {"exif": exif}
    data = making.encoded(np.ascontiguousarray(SAVED[orientation](UPRIGHT)), ending, **options)
    assert Decoder().shape_of(data, "i") == UPRIGHT.shape
    # Lossy formats blur the edges. With a wrong orientation, the mean difference would be 80.
    assert np.abs(Decoder().decode(data, "i", UPRIGHT.shape) - UPRIGHT.astype(int)).mean() < 15
    cropped = Decoder(size=12).decode(data, "i", (3, 12, 12))
    assert np.abs(cropped - UPRIGHT[:, :, 2:14].astype(int)).mean() < 20


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!!!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
def test_an_unreadable_orientation_is_ignored(exif: bytes):
    data, plain = making.encoded(UPRIGHT, "jpg", exif=exif), making.encoded(UPRIGHT, "jpg")
    assert np.array_equal(Decoder().decode(data, "i", UPRIGHT.shape), Decoder().decode(plain, "i", UPRIGHT.shape))


def test_images_cached_by_an_older_version_without_orientation_are_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    making.write_folder(tmp_path, making.pixels(4), [0] * 4)
    (tmp_path / "a" / "turned.png").write_bytes(making.encoded(making.pixels(1, seed=9)[0], exif=exif))
    config = DataConfig(kind="folder", root=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(encoded, "_upright", lambda image: image)
        patch.setattr(decoded, "VERSION", 1)
        before = open_dataset(config)
    open_dataset.cache_clear()
    after = open_dataset(config)
    images = [to_bytes(all_rows(data.held_out).images).numpy()[0] for data in (before, after)]
    assert np.array_equal(images[0], making.pixels(1, seed=9)[0])
    assert np.array_equal(images[1], images[0][:, ::-1, ::-1])
    assert before.description.sha256 != after.description.sha256
