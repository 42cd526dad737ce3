"""Datasets: what the project's own two hold, and the refusal of others."""

import pytest
import torch

from kac.data import DATASETS, Dataset, load_dataset


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_images_are_bounded_and_labels_are_classes(name):
    data = load_dataset(name)
    assert data.name == name
    assert data.images.dtype == torch.float32
    assert data.labels.dtype == torch.int64
    assert len(data.images) == len(data.labels)
    assert data.images.shape[1:] == data.sample_shape
    assert -1 <= data.images.min().item() < data.images.max().item() <= 1
    assert data.labels.unique().tolist() == list(range(data.num_classes))


def test_digits_are_those_of_scikit_learn():
    data = load_dataset("digits")
    assert (len(data.images), data.sample_shape, data.num_classes) == (1797, (1, 8, 8), 10)
    assert (data.images.min().item(), data.images.max().item()) == (-1, 1)
    assert torch.equal(data.images * 8, (data.images * 8).round())  # 17 grey levels, an eighth apart
    assert torch.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    ink = data.images.mean((1, 2, 3))
    assert ink[data.labels == 8].mean() > ink[data.labels == 1].mean() > -0.5


def test_moons_are_two_crescents():
    data = load_dataset("moons")
    assert (len(data.images), data.sample_shape, data.num_classes) == (4096, (2,), 2)
    upper, lower = data.images[data.labels == 0], data.images[data.labels == 1]
    assert len(upper) == len(lower)
    assert upper[:, 1].mean() > 0.1
    assert lower[:, 1].mean() < -0.1
    radius = (upper * 2 + torch.tensor([0.5, 0.25])).norm(dim=1)  # of the unit circle the upper moon lies on
    assert radius.mean().item() == pytest.approx(1, abs=0.01)
    assert radius.std().item() == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_a_dataset_is_the_same_every_time(name):
    torch.manual_seed(0)
    first = load_dataset(name)
    torch.manual_seed(1)
    second = load_dataset(name)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)


def test_class_frequencies_are_shares():
    data = Dataset("some", torch.zeros(8, 2), torch.tensor([0, 0, 0, 0, 1, 1, 3, 3]), num_classes=5)
    assert data.class_frequencies == (0.5, 0.25, 0.0, 0.25, 0.0)
    assert sum(load_dataset("digits").class_frequencies) == pytest.approx(1, abs=1e-12)


def test_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"unknown dataset 'mnist': expected one of \['digits', 'moons'"):
        load_dataset("mnist")
