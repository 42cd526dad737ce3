"""Refinement: the energy distance, its loss over classes and spaces, and gradients through what is delivered."""

import pytest
import torch

from kac.images import delivered
from kac.refinement import Pixels, Pooled, energy_distance, refinement_loss, straight_through


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_energy_distance_is_that_of_its_definition():
    x, y = torch.randn(2, 5, 3, generator=seeded(0), dtype=torch.float64)

    def mean(a, b, skip_same=False):
        pairs = [(a[i] - b[j]).norm() for i in range(5) for j in range(5) if not (skip_same and i == j)]
        return torch.stack(pairs).mean()

    expected = 2 * mean(x, y) - mean(x, x, True) - mean(y, y, True)
    assert energy_distance(x, y).item() == pytest.approx(expected.item(), rel=1e-12)


def test_it_is_zero_on_average_for_one_law_and_positive_for_two():
    generator = seeded(1)
    same = [energy_distance(*torch.randn(2, 32, 4, generator=generator)).item() for _ in range(400)]
    mean, error = torch.tensor(same).mean().item(), torch.tensor(same).std().item() / 400**0.5
    assert abs(mean) < 4 * error
    shifted = energy_distance(torch.randn(500, 4, generator=generator), torch.randn(500, 4, generator=generator) + 1)
    assert shifted.item() > 0.3


def loss_of(samples, label, real, real_label, weight=0.5, spaces=None):
    return refinement_loss(samples, label, real, real_label, spaces or [Pixels()], weight, 2)


def test_classes_that_are_mixed_up_cost_even_where_the_images_together_are_right():
    generator = seeded(2)
    label = torch.arange(200) % 2
    real = torch.randn(200, 1, 4, 4, generator=generator) + 3.0 * label[:, None, None, None]
    made = torch.randn(200, 1, 4, 4, generator=generator) + 3.0 * label[:, None, None, None]
    right, wrong = loss_of(made, label, real, label).item(), loss_of(made, 1 - label, real, label).item()
    assert abs(right) < 0.02
    assert wrong > 0.05
    assert abs(loss_of(made, 1 - label, real, label, weight=0.0).item()) < 0.02


def test_the_loss_does_not_depend_on_the_unit_of_the_pixels():
    generator = seeded(3)
    made, real = torch.randn(2, 20, 1, 4, 4, generator=generator)
    label = torch.arange(20) % 2
    one, ten = loss_of(made, label, real, label).item(), loss_of(10 * made, label, 10 * real, label).item()
    assert one == pytest.approx(ten, rel=1e-4)


def test_several_spaces_count_alike():
    generator = seeded(4)
    made, real = torch.randn(2, 20, 1, 8, 8, generator=generator)
    label = torch.arange(20) % 2
    apart = [loss_of(made, label, real, label, spaces=(space,)).item() for space in (Pixels(), Pooled())]
    both = loss_of(made, label, real, label, spaces=(Pixels(), Pooled())).item()
    assert both == pytest.approx(sum(apart) / 2, rel=1e-5)
    assert Pooled()(made).shape == (20, 4)


def test_what_is_delivered_is_compared_and_its_gradient_passes_as_if_nothing_was_clipped():
    samples = torch.tensor([[[[-1.7, 0.3], [0.9999, 1.2]]]], requires_grad=True)
    made = straight_through(samples)
    assert torch.equal(made, delivered(samples.detach()))
    made.sum().backward()
    assert torch.equal(samples.grad, torch.ones_like(samples))


def test_its_slope_brings_samples_to_the_data():
    generator = seeded(5)
    real, label = torch.randn(64, 1, 2, 2, generator=generator), torch.arange(64) % 2
    made = (torch.randn(64, 1, 2, 2, generator=generator) + 2).requires_grad_()
    first = loss_of(made, label, real, label)
    for _ in range(100):
        (slope,) = torch.autograd.grad(loss_of(made, label, real, label), made)
        made = (made - 20 * slope).detach().requires_grad_()
    assert loss_of(made, label, real, label).item() < 0.1 * first.item()
