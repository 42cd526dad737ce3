"""Metrics against their formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from torch import nn

from kac.data import DataConfig, all_rows, open_dataset
from kac.metrics import QUALITY, Judged, Pixels, Reference, endpoint_error, frechet_distance, label_agreement


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(count: int, seed: int, size: int = 5) -> torch.Tensor:
    """Correlated samples [count, size] about a mean of their own."""
    mix = torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)
    mean = torch.randn(size, generator=seeded(seed + 1), dtype=torch.float64)
    return torch.randn(count, size, generator=seeded(seed + 2), dtype=torch.float64) @ mix + mean


def by_hand(real: torch.Tensor, fake: torch.Tensor) -> float:
    """|mu_r - mu_f|^2 + Tr(S_r + S_f - 2 (S_r S_f)^(1/2)), through the symmetric root of S_r."""
    real, fake = (x.flatten(1).double().numpy() for x in (real, fake))
    s_real, s_fake = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    values, vectors = np.linalg.eigh(s_real)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s_fake @ root).clip(0)).sum()
    return float(((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(s_real) + np.trace(s_fake) - 2 * cross)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.integers(2, 9))
def test_frechet_distance_is_the_formula(seed, size):
    real, fake = samples(400, seed, size), samples(300, seed + 10, size)
    assert frechet_distance(real, fake) == pytest.approx(by_hand(real, fake), rel=1e-6, abs=1e-8)
    assert frechet_distance(fake, real) == pytest.approx(frechet_distance(real, fake), rel=1e-6, abs=1e-8)


def test_frechet_distance_agrees_with_the_matrix_root():
    real, fake = samples(400, 1), samples(400, 2)
    s_real, s_fake = np.cov(real.numpy(), rowvar=False), np.cov(fake.numpy(), rowvar=False)
    trace = np.trace(s_real + s_fake - 2 * linalg.sqrtm(s_real @ s_fake).real)
    mean = ((real.mean(0) - fake.mean(0)) ** 2).sum().item()
    assert frechet_distance(real, fake) == pytest.approx(mean + trace, rel=1e-6)


def test_frechet_distance_of_known_changes():
    real = samples(500, 3)
    spread = real.var(0).sum().item()
    mean = (real.mean(0) ** 2).sum().item()
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6 * spread)
    assert frechet_distance(real, real + 2) == pytest.approx(5 * 4, rel=1e-6)
    assert frechet_distance(real, 3 * real) == pytest.approx(4 * (mean + spread), rel=1e-6)


def test_frechet_distance_of_images_with_constant_pixels():
    """The digits' corners are blank in every image: their covariance has no full rank."""
    images = all_rows(open_dataset(DataConfig()).train).images
    real, fake = images[:700], images[700:]
    assert bool((images.flatten(1).std(0) == 0).any())
    distance = frechet_distance(real, fake)
    assert distance == pytest.approx(by_hand(real, fake), rel=1e-4)
    assert distance < frechet_distance(real, fake + 0.1 * torch.randn(fake.shape, generator=seeded(4)))


class Half(nn.Module):
    """Features that are linear in the image: half its first three values."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(3, 5) / 2)

    def forward(self, images):
        return self.linear(images)


def test_frechet_distance_is_taken_between_features():
    real, fake = samples(400, 5), samples(400, 6)
    assert frechet_distance(real, fake, Half()) == pytest.approx(by_hand(real[:, :3] / 2, fake[:, :3] / 2), rel=1e-5)


def test_feature_network_is_left_as_it_was():
    features = Half()
    frechet_distance(samples(50, 5), samples(50, 6), features)
    assert features.linear.weight.dtype == torch.float32
    assert features(torch.ones(1, 5)).tolist() == [[0.5, 0.5, 0.5]]


def test_pixels_are_the_flattened_sample():
    images = torch.rand(4, 3, 2, 2)
    assert Pixels((3, 2, 2)).num_features == 12
    assert torch.equal(Pixels((3, 2, 2))(images), images.reshape(4, 12))


def test_classifier_knows_held_out_digits_and_not_noise():
    data = open_dataset(DataConfig())
    classifier, held_out = Reference(data).classifier, all_rows(data.held_out)
    assert label_agreement(classifier, *held_out) > 0.97
    assert label_agreement(classifier, held_out.images, (held_out.labels + 1) % 10) < 0.01
    noise = torch.rand(350, 1, 8, 8, generator=seeded(7)) * 2 - 1
    assert label_agreement(classifier, noise, held_out.labels[:350]) < 0.3


def test_every_metric_is_that_of_its_name():
    data = open_dataset(DataConfig())
    reference, (real, label) = Reference(data), all_rows(data.held_out)
    teacher = Judged(real, label, 100, 10.0, reference)
    student = Judged(real + 0.1, label, 2, 500.0, reference, teacher)
    train = all_rows(data.train).images
    expected = {
        "nfe": 2,
        "frechet_distance": frechet_distance(train, real + 0.1),
        "frechet_ratio": frechet_distance(train, real + 0.1) / frechet_distance(train, real),
        "label_agreement": label_agreement(reference.classifier, real + 0.1, label),
        "endpoint_error": pytest.approx(0.1, rel=1e-5),
        "images_per_second": 500.0,
    }
    assert {name: student.score(name) for name in QUALITY} == expected
    assert [name for name in QUALITY if teacher.score(name) is None] == ["frechet_ratio", "endpoint_error"]


def test_label_agreement_is_the_share_of_equal_labels():
    images = torch.tensor([[0.1], [0.9], [0.2], [0.8]])
    label = torch.tensor([0, 1, 1, 1])
    assert label_agreement(lambda images: (images[:, 0] > 0.5).long(), images, label) == 0.75


def test_endpoint_error_is_the_root_mean_square_per_coordinate():
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [0.0, 8.0]])
    assert endpoint_error(student, teacher) == 2.5
    assert endpoint_error(student, student) == 0
