"""Bundled datasets, which need no files: their content, splits and options."""

import typing

import pytest
import torch

from kac.data import DataConfig, all_rows, open_dataset
from kac.data.dataset import every_nth_of_each_class
from kac.data.in_memory import BUNDLED, HELP, BundledKind, in_memory
from kac.util.errors import ArgumentError

DIGITS_SHA256 = "453743eb618751711f3bc7f631f76eb290619dcbf65cfb5cbf7e75c3faaa2e8b"


def whole(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    data = open_dataset(DataConfig(kind=kind))
    parts = all_rows(data.train), all_rows(data.held_out)
    return torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])


@pytest.mark.parametrize("kind", sorted(BUNDLED))
def test_images_and_labels_are_in_range(kind):
    described = open_dataset(DataConfig(kind=kind)).description
    images, labels = whole(kind)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.shape == (described.train + described.held_out, *described.sample_shape)
    assert -1 <= images.min().item() < images.max().item() <= 1
    assert labels.unique().tolist() == list(range(described.num_classes))
    assert sum(described.class_frequencies) == pytest.approx(1, abs=1e-12)


def test_the_hash_of_the_digits_never_changes():
    """Every fingerprint of a teacher of the digits includes the hash."""
    assert open_dataset(DataConfig(kind="digits")).description.sha256 == DIGITS_SHA256


def test_the_digits_are_those_of_scikit_learn():
    images, labels = whole("digits")
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert torch.equal(images * 8, (images * 8).round())  # 17 grey levels, an eighth apart
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    ink = images.mean((1, 2, 3))
    assert ink[labels == 8].mean() > ink[labels == 1].mean() > -0.5


def test_moons_are_two_crescents():
    images, labels = whole("moons")
    assert images.shape == (4096, 2)
    upper, lower = images[labels == 0], images[labels == 1]
    assert len(upper) == len(lower)
    assert upper[:, 1].mean() > 0.1
    assert lower[:, 1].mean() < -0.1
    radius = (upper * 2 + torch.tensor([0.5, 0.25])).norm(dim=1)  # distance from the centre of the upper moon
    assert radius.mean().item() == pytest.approx(1, abs=0.01)
    assert radius.std().item() == pytest.approx(0.05, abs=0.01)


def test_gaussians_are_eight_modes_on_a_circle():
    images, labels = whole("gaussians")
    assert images.shape == (4096, 2)
    assert torch.bincount(labels).tolist() == [512] * 8
    assert images.abs().max() < 1  # nothing is clamped
    for label in range(8):
        mode = images[labels == label]
        angle = torch.tensor(label * torch.pi / 4)
        centre = 0.75 * torch.stack([angle.cos(), angle.sin()])
        assert torch.allclose(mode.mean(0), centre, atol=0.01)
        assert mode.std(0).tolist() == pytest.approx([0.05, 0.05], abs=0.006)


@pytest.mark.parametrize("kind", sorted(BUNDLED))
def test_a_fifth_of_each_class_is_held_out_and_no_image_is_in_both_splits(kind):
    data = open_dataset(DataConfig(kind=kind))
    train, held_out = all_rows(data.train), all_rows(data.held_out)
    described = data.description
    assert (len(data.train), len(data.held_out)) == (described.train, described.held_out)
    for label in range(described.num_classes):
        counts = [int((part.labels == label).sum()) for part in (train, held_out)]
        assert counts[1] == sum(counts) // 5
    both = torch.cat([train.images, held_out.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)


def test_rows_are_in_the_requested_order():
    data = in_memory(torch.arange(20.0)[:, None] / 20, torch.arange(20) % 2, num_classes=2)
    images, labels = data.train.rows(torch.tensor([3, 0, 3]))
    assert images[:, 0].tolist() == [all_rows(data.train).images[i, 0].item() for i in (3, 0, 3)]
    assert labels.tolist() == [all_rows(data.train).labels[i].item() for i in (3, 0, 3)]


def test_every_nth_image_of_each_class_is_held_out():
    labels = torch.tensor([0, 1, 0, 0, 1, 1, 1, 0, 2])
    assert torch.nonzero(every_nth_of_each_class(labels, 2)).flatten().tolist() == [2, 4, 6, 7]


def test_class_frequencies_are_those_of_the_training_images():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3, 0])
    held_out = torch.arange(9) == 8
    data = in_memory(torch.zeros(9, 2), labels, num_classes=5, held_out=held_out)
    assert data.description.class_frequencies == (0.5, 0.25, 0.0, 0.25, 0.0)


def test_the_hash_depends_on_images_labels_shape_and_split():
    images, labels = torch.rand(10, 4), torch.arange(10) % 2
    none = torch.zeros(10, dtype=torch.bool)

    def sha256(*parts) -> str:
        return in_memory(parts[0], parts[1], 2, parts[2]).description.sha256

    variants = [
        (images, labels, none),
        (images.flip(0), labels, none),
        (images, 1 - labels, none),
        (images.reshape(10, 2, 2), labels, none),
        (images, labels, torch.arange(10) == 3),
    ]
    assert len({sha256(*parts) for parts in variants}) == len(variants)
    assert sha256(*variants[0]) == sha256(*(part.clone() for part in variants[0]))


def test_every_bundled_dataset_has_a_name_and_help():
    assert set(typing.get_args(BundledKind)) == set(BUNDLED)
    assert all(kind in HELP for kind in BUNDLED)


def test_a_dataset_is_opened_once_per_process():
    assert open_dataset(DataConfig(kind="moons")) is open_dataset(DataConfig(kind="moons"))


@pytest.mark.parametrize(
    ("option", "values"),
    [("kind", {"kind": "mnist"}), ("root", {"kind": "digits", "root": "/data"}), ("root", {"kind": "idx"})],
)
def test_an_unknown_kind_and_a_wrong_root_are_refused(option, values):
    with pytest.raises(ArgumentError) as error:
        DataConfig(**values)
    assert error.value.name == option
