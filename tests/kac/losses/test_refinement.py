"""Refinement: the energy distance, the loss over distances, classes and spaces, and delivered samples."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from kac.data import DataConfig, Dataset, LabelledImages, open_dataset
from kac.data.in_memory import InMemorySplit, in_memory
from kac.losses import refinement
from kac.losses.refinement import (
    CLASSIFIER,
    DRIFT_RADII,
    DRIFT_STEP,
    REFINEMENT_DISTANCES,
    DataRefinementConfig,
    RefinementDistance,
    RefinementLoss,
    RefinementSpace,
    SpaceInputs,
    SpaceName,
    check_spaces,
    drift_loss,
    drifting_field,
    energy_distance,
    mean_distance,
    open_spaces,
    straight_through,
)
from kac.metrics import classifier
from kac.metrics.classifier import EVALUATION_CLASSIFIER
from kac.model import Model
from kac.networks import DiTConfig, MLPConfig, OutsideConfig, UNetConfig, build_network
from kac.precision import Precision
from kac.util.errors import ArgumentError
from kac.util.fingerprint import hashed_values
from kac.util.images import delivered


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_energy_distance_matches_its_definition():
    x, y = torch.randn(2, 5, 3, generator=seeded(0), dtype=torch.float64)

    def mean(a, b, skip_same=False):
        pairs = [(a[i] - b[j]).norm() for i in range(5) for j in range(5) if not (skip_same and i == j)]
        return torch.stack(pairs).mean()

    expected = 2 * mean(x, y) - mean(x, x, True) - mean(y, y, True)
    assert energy_distance(x, y).item() == pytest.approx(expected.item(), rel=1e-12)


def test_energy_distance_is_zero_on_average_only_for_equal_distributions():
    generator = seeded(1)
    same = [energy_distance(*torch.randn(2, 32, 4, generator=generator)).item() for _ in range(400)]
    mean, error = torch.tensor(same).mean().item(), torch.tensor(same).std().item() / 400**0.5
    assert abs(mean) < 4 * error
    shifted = energy_distance(torch.randn(500, 4, generator=generator), torch.randn(500, 4, generator=generator) + 1)
    assert shifted.item() > 0.3


def split(images, label):
    return InMemorySplit(LabelledImages(images, label))


def inputs(data, network=None, conditioning="classes_and_null", **options):
    shape, classes = data.description.sample_shape, data.description.num_classes
    teacher = build_network(network or MLPConfig(width=16), shape, classes)
    config: Any = SimpleNamespace(conditioning=conditioning)
    return SpaceInputs(data, torch.device("cpu"), lambda: Model(teacher, config), **options)


def loss_of(samples, label, real, real_label, weight=0.5, spaces=None, classes=2):
    loss = RefinementLoss(split(real, real_label), spaces or [pixels], classes, "energy", weight)
    return loss(samples, label, torch.arange(len(real)))


pixels = RefinementSpace(lambda samples, update: [samples.flatten(1)], is_cheap=True)
two_parts = RefinementSpace(lambda samples, update: [samples.flatten(1)[:, :21], samples.flatten(1)[:, 21:]])


def test_the_drifting_field_matches_its_definition():
    x, y = torch.randn(4, 2, generator=seeded(7)).double() / 8, torch.randn(3, 2, generator=seeded(8)).double() / 8
    expected = torch.zeros_like(x)
    for radius in DRIFT_RADII:
        kernel = torch.zeros(4, 7, dtype=torch.float64)
        for i in range(4):
            for j, point in enumerate([*y, *x]):
                kernel[i, j] = 0 if j == i + 3 else math.exp(-(x[i] - point).norm() / radius)
        affinity = (kernel / kernel.sum(0) * kernel / kernel.sum(1)[:, None]).sqrt()
        v = torch.zeros_like(x)
        for i in range(4):
            for j in range(3):
                for k in range(4):
                    v[i] += affinity[i, j] * affinity[i, 3 + k] * (y[j] - x[k])
        expected += DRIFT_STEP * v / (v**2).sum(1).mean() ** 0.5
    torch.testing.assert_close(drifting_field(x, y), expected)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(drift_loss(x, y), x)
    torch.testing.assert_close(gradient, -2 * expected / len(expected))


@pytest.mark.parametrize("name", get_args(RefinementDistance))
def test_samples_that_lie_too_close_together_spread_like_the_data(name):
    generator = seeded(9)
    real, samples = torch.randn(2, 128, 2, generator=generator)
    samples, label = 0.2 * samples + 0.5, torch.zeros(128, dtype=torch.long)
    loss, rows = RefinementLoss(split(real, label), [pixels], 0, distance=name), torch.arange(128)
    for _ in range(300):
        samples.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(samples, label, rows), samples)
        samples = (samples - 0.02 * gradient.sign()).detach()
    assert samples.std(0).tolist() == pytest.approx(real.std(0).tolist(), rel=0.25)
    assert samples.mean(0).tolist() == pytest.approx(real.mean(0).tolist(), abs=0.15)


def test_the_loss_uses_the_named_distance(monkeypatch: pytest.MonkeyPatch):
    def gap(x: torch.Tensor, y: torch.Tensor, within_y: torch.Tensor, update: int) -> torch.Tensor:
        return (x.mean() - y.mean()).abs() + within_y + update

    monkeypatch.setitem(REFINEMENT_DISTANCES, "gap", gap)
    samples, real = torch.tensor([[5.0], [7.0]]), torch.tensor([[0.0], [2.0]])  # mean distance between real points: 2
    label = torch.zeros(2, dtype=torch.long)
    loss = RefinementLoss(split(real, label), [pixels], num_classes=0, distance="gap")
    assert loss(samples, label, torch.arange(2), update=10).item() == 13.5


def test_every_distance_has_a_name_for_the_option_and_former_defaults_have_no_fingerprint():
    assert tuple(REFINEMENT_DISTANCES) == get_args(RefinementDistance)
    assert hashed_values(DataRefinementConfig(distance="energy", spaces=("pixels",))) == {"kind": "data"}


def test_swapped_classes_raise_the_loss_even_if_all_images_together_match():
    generator = seeded(2)
    label = torch.arange(200) % 2
    real = torch.randn(200, 1, 4, 4, generator=generator) + 3.0 * label[:, None, None, None]
    samples = torch.randn(200, 1, 4, 4, generator=generator) + 3.0 * label[:, None, None, None]
    correct, swapped = loss_of(samples, label, real, label).item(), loss_of(samples, 1 - label, real, label).item()
    assert abs(correct) < 0.02
    assert swapped > 0.05
    assert abs(loss_of(samples, 1 - label, real, label, weight=0.0).item()) < 0.02


def test_loss_does_not_depend_on_the_unit_of_pixels():
    generator = seeded(3)
    samples, real = torch.randn(2, 20, 1, 4, 4, generator=generator)
    label = torch.arange(20) % 2
    one, ten = loss_of(samples, label, real, label).item(), loss_of(10 * samples, label, 10 * real, label).item()
    assert one == pytest.approx(ten, rel=1e-4)


def test_spaces_have_equal_weight_whatever_their_number_of_features():
    generator = seeded(4)
    samples, real = torch.randn(2, 20, 1, 8, 8, generator=generator)
    label = torch.arange(20) % 2
    by_space = [loss_of(samples, label, real, label, spaces=[space]).item() for space in (pixels, two_parts)]
    both = loss_of(samples, label, real, label, spaces=[pixels, two_parts]).item()
    assert both == pytest.approx(sum(by_space) / 2, rel=1e-5)
    by_part = [
        loss_of(part(samples), label, part(real), label).item()
        for part in (lambda x: x.flatten(1)[:, :21], lambda x: x.flatten(1)[:, 21:])
    ]
    assert by_space[1] == pytest.approx(sum(by_part) / 2, rel=1e-5)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLKAC_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(classifier, "MIN_UPDATES", 60)
        patch.setattr(classifier, "MAX_UPDATES", 60)
        yield open_dataset(DataConfig(kind="digits"))


@pytest.mark.parametrize("name", get_args(SpaceName))
def test_every_space_has_gradients_and_near_zero_loss_for_real_images(name, digits):
    (space,) = open_spaces([name], inputs(digits))
    real, label = digits.train.rows(torch.arange(400))
    features = space.features(real[:7].clone().requires_grad_(), 3)
    assert all(part.ndim == 2 and len(part) == 7 and part.requires_grad for part in features)
    again = [space.features(real[:7], 3) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*again, strict=True))
    loss = RefinementLoss(split(real[200:], label[200:]), [space], 10, "energy")

    def distance(samples: torch.Tensor) -> float:
        return loss(samples, label[:200], torch.arange(200)).item()

    assert distance(real[:200]) < 0.05
    assert distance(-real[:200]) > 0.2


@pytest.mark.parametrize(
    ("network", "shapes"),
    [
        (MLPConfig(width=24, depth=7), [(24,)] * 5),
        # Maps of 8 x 8 give means and deviations, maps of 4 x 4 only their values.
        (UNetConfig(channels=(8, 16), groups=4), [(8, 4, 4), *[(16, 4, 4)] * 4, *[(8, 4, 4)] * 2]),
        (DiTConfig(heads=2, head_channels=8, depth=6, patch=1), [(16, 4, 4)] * 10),
    ],
    ids=["mlp", "unet", "dit"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_teacher_features_are_five_layers_of_every_network(network, shapes, dtype, digits):
    given = inputs(digits, network, precision=Precision(dtype=dtype, compile=False))
    teacher = given.teacher().network
    seen = []
    for layer in teacher.feature_layers():
        layer.register_forward_hook(lambda module, arguments, output: seen.append(output))
    (space,) = open_spaces(["teacher"], given)
    samples = digits.train.rows(torch.arange(6)).images
    features = space.features(samples, 0)
    assert [part.shape for part in features] == [(6, math.prod(shape)) for shape in shapes]
    assert all(part.dtype == torch.float32 for part in features)
    outputs = [each[0] if isinstance(each, tuple) else each for each in seen]
    first, last = outputs[0], outputs[-1]
    if network.kind == "dit":
        first, last = (each.transpose(1, 2).unflatten(2, (8, 8)) for each in (first, last))
    if network.kind == "mlp":
        expected = [first, last]
    else:
        cells = last.float().unflatten(2, (4, 2)).unflatten(4, (4, 2))
        expected = [torch.nn.functional.adaptive_avg_pool2d(first.float(), 4), cells.std((3, 5), correction=0)]
    for part, values in zip((features[0], features[-1]), expected, strict=True):
        assert torch.allclose(part, values.float().flatten(1), atol=1e-3)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(("conditioning", "label"), [("classes_and_null", 10), ("none", 10), ("classes", 0)])
def test_teacher_features_use_a_label_that_the_teacher_knows(conditioning, label, digits):
    given = inputs(digits, conditioning=conditioning)
    seen = []
    given.teacher().network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    (space,) = open_spaces(["teacher"], given)
    space.features(digits.train.rows(torch.arange(3)).images, 0)
    assert torch.equal(seen[0], torch.full((3,), label))


def test_teacher_features_of_an_outside_network_are_its_velocity():
    points = in_memory(torch.randn(20, 5, 16, generator=seeded(11)).clamp(-1, 1), torch.arange(20) % 2, 2)
    module = {"module": "tests.kac.outside_modules:Blind", "labels": "none"}
    (space,) = open_spaces(["teacher"], inputs(points, OutsideConfig(**module)))
    samples = points.train.rows(torch.arange(4)).images
    (features,) = space.features(samples, 0)
    assert features.shape == (4, 80)


def test_the_drift_of_enlarged_images_pulls_as_strongly_against_the_anchor():
    """An anchor is a mean over pixels, so the distance's gradient must not depend on the number of pixels either."""
    real, samples = torch.randn(2, 40, 1, 4, 4, generator=seeded(12))
    label, rows, norms = torch.arange(40) % 2, torch.arange(40), []
    for side in (1, 3):
        images, x = (each.repeat_interleave(side, 2).repeat_interleave(side, 3) for each in (real, samples))
        x.requires_grad_()
        loss = RefinementLoss(split(images, label), [pixels], 2, "drift")(x, label, rows)
        anchor = (x - images).square().mean()
        norms.append([torch.autograd.grad(each, x)[0].norm() for each in (loss, anchor)])
    (small, small_anchor), (large, large_anchor) = norms
    assert float(large / large_anchor) == pytest.approx(float(small / small_anchor), rel=1e-3)


def test_teacher_features_ignore_an_earlier_call(digits):
    (space,) = open_spaces(["teacher"], inputs(digits))
    real = digits.train.rows(torch.arange(8)).images
    before = [part.clone() for part in space.features(real[:5], 0)]
    space.features(real, 0)
    assert all(torch.equal(*pair) for pair in zip(before, space.features(real[:5], 0), strict=True))


@pytest.mark.parametrize("classes", [0, 2])
def test_kept_features_are_computed_once_and_change_no_value(classes, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def features(samples, update):
        calls.append(len(samples))
        return [samples.flatten(1), samples.flatten(1).square()]

    generator = seeded(6)
    real, samples = torch.randn(2, 40, 1, 2, 2, generator=generator)
    label, rows = torch.arange(40) % 2, torch.randperm(40, generator=generator)
    losses = [
        RefinementLoss(split(real, label), [RefinementSpace(features, is_frozen)], classes, "energy")
        for is_frozen in (False, True)
    ]
    assert calls == [40]
    assert losses[0](samples, label, rows).item() == pytest.approx(losses[1](samples, label, rows).item(), abs=1e-6)
    assert calls == [40, 40, 40, 40], "samples, and real images only if they are not kept"
    monkeypatch.setattr(refinement, "BANK_IMAGES", 30)
    bank = RefinementLoss(split(real, label), [RefinementSpace(features), pixels], classes, "energy")
    assert bank.count == len(bank.ids.unique()) == 30
    for n in (0, 1):
        known = bank.kept[n][0]
        assert torch.allclose(known.points[:, :4] * known.unit, real[bank.ids].flatten(1), atol=1e-6)


@pytest.mark.parametrize(("values", "most"), [(2**22, 256), (100, 25), (1, 1)])
def test_a_network_sees_a_limited_number_of_training_images_per_call(values, most, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refinement, "BLOCK_VALUES", values)
    calls = []

    def features(samples, update):
        calls.append(len(samples))
        return [samples.flatten(1)]

    real, label = torch.randn(300, 1, 2, 2, generator=seeded(13)), torch.arange(300) % 2
    RefinementLoss(split(real, label), [RefinementSpace(features)], 2, "drift")
    assert sum(calls) == 300 and max(calls) == most


def test_the_unit_is_the_mean_distance_even_if_images_are_sorted_by_class(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refinement, "UNIT_IMAGES", 100)
    label = torch.arange(400) // 200
    real = label[:, None] + 0.01 * torch.randn(400, 2, generator=seeded(10))
    (known,) = RefinementLoss(split(real, label), [pixels], 2, "energy").kept[0]
    assert known.unit.item() == pytest.approx(mean_distance(real).item(), rel=0.1)


def test_random_features_change_per_update_without_using_the_global_generator(digits):
    (space,) = open_spaces(["random"], inputs(digits))
    real = digits.train.rows(torch.arange(5)).images
    torch.manual_seed(0)
    first, second = space.features(real, 0), space.features(real, 1)
    assert all((a - b).abs().max() > 0.1 for a, b in zip(first, second, strict=True))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))
    assert len(space.features(torch.randn(4, 2), 0)) == 3  # points


def test_refinement_and_evaluation_use_different_classifiers():
    assert (CLASSIFIER.width, CLASSIFIER.seed) != (EVALUATION_CLASSIFIER.width, EVALUATION_CLASSIFIER.seed)
    assert CLASSIFIER.identity("data") != EVALUATION_CLASSIFIER.identity("data")


def test_refuses_spaces_that_do_not_exist_for_the_data():
    with pytest.raises(ArgumentError, match=r"`refine\.spaces` pooled.*\[2\]"):
        check_spaces(["pixels", "pooled"], (2,), 2)
    with pytest.raises(ArgumentError, match=r"`refine\.spaces` classifier"):
        check_spaces(["classifier"], (1, 8, 8), 1)


def test_straight_through_delivers_samples_and_ignores_clipping_in_the_gradient():
    samples = torch.tensor([[[[-1.7, 0.3], [0.9999, 1.2]]]], requires_grad=True)
    images = straight_through(samples)
    assert torch.equal(images, delivered(samples.detach()))
    images.sum().backward()
    assert torch.equal(samples.grad, torch.ones_like(samples))


def test_gradient_descent_moves_samples_to_the_data():
    generator = seeded(5)
    real, label = torch.randn(64, 1, 2, 2, generator=generator), torch.arange(64) % 2
    samples = (torch.randn(64, 1, 2, 2, generator=generator) + 2).requires_grad_()
    first = loss_of(samples, label, real, label)
    for _ in range(100):
        (gradient,) = torch.autograd.grad(loss_of(samples, label, real, label), samples)
        samples = (samples - 20 * gradient).detach().requires_grad_()
    assert loss_of(samples, label, real, label).item() < 0.1 * first.item()
