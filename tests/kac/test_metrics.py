"""Metrics agree with their formulas and with other implementations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from kac.data import DataConfig, all_rows, open_dataset
from kac.metrics import Evaluated, Moments, Reference, Statistics, distances, quality_metrics
from kac.metrics import statistics as statistics_module


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(count: int, seed: int, size: int = 5) -> torch.Tensor:
    """Return correlated samples [count, size] with a random mean."""
    mix = torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)
    mean = torch.randn(size, generator=seeded(seed + 1), dtype=torch.float64)
    return torch.randn(count, size, generator=seeded(seed + 2), dtype=torch.float64) @ mix + mean


def moments(rows: torch.Tensor, part: int = 150) -> Moments:
    result = Moments(rows.shape[1])
    for chunk in torch.split(rows, part):
        result.add(chunk)
    return result


def frechet(real: torch.Tensor, fake: torch.Tensor) -> float:
    return distances.frechet_distance(moments(real), moments(fake))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 400))
def test_streamed_moments_equal_the_moments_of_all_rows(seed, size, part):
    rows = samples(400, seed, size)
    collected = moments(rows, part)
    assert collected.count == 400
    np.testing.assert_allclose(collected.mean, rows.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(collected.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-8, atol=1e-9)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31), st.integers(2, 9))
def test_frechet_distance_equals_its_formula(seed, size):
    real, fake = samples(400, seed, size), samples(300, seed + 10, size)
    s_real, s_fake = np.cov(real.numpy(), rowvar=False), np.cov(fake.numpy(), rowvar=False)
    trace = np.trace(s_real + s_fake - 2 * linalg.sqrtm(s_real @ s_fake).real)
    mean = ((real.mean(0) - fake.mean(0)) ** 2).sum().item()
    assert frechet(real, fake) == pytest.approx(mean + trace, rel=1e-6, abs=1e-8)
    assert frechet(fake, real) == pytest.approx(frechet(real, fake), rel=1e-6, abs=1e-8)


def test_frechet_distance_equals_that_of_torchmetrics_for_images_with_constant_pixels():
    """The corners of the digits are blank in all images, so the covariance does not have full rank."""
    images = all_rows(open_dataset(DataConfig()).train).images.flatten(1)
    assert bool((images.std(0) == 0).any())
    metric = FrechetInceptionDistance(feature=Flat(), normalize=True).set_dtype(torch.float64)
    metric.update(images[:700].double(), real=True)
    metric.update(images[700:].double(), real=False)
    assert frechet(images[:700], images[700:]) == pytest.approx(float(metric.compute()), rel=1e-4)


class Flat(torch.nn.Identity):
    num_features = 64


def test_frechet_distance_of_known_changes():
    real = samples(500, 3)
    spread, mean = real.var(0).sum().item(), (real.mean(0) ** 2).sum().item()
    assert frechet(real, real) == pytest.approx(0, abs=1e-6 * spread)
    assert frechet(real, real + 2) == pytest.approx(5 * 4, rel=1e-6)
    assert frechet(real, 3 * real) == pytest.approx(4 * (mean + spread), rel=1e-6)


def test_kernel_distance_equals_the_unbiased_mmd_of_torchmetrics():
    real, fake = samples(80, 1), samples(80, 7)
    assert distances.kernel_distance(real, fake) == pytest.approx(float(poly_mmd(real, fake)), rel=1e-9)


@pytest.mark.parametrize("count", [300, 200, 37])
def test_sliced_wasserstein_of_a_shift_is_its_square_over_the_width(count):
    real = samples(300, 3).float()
    near = distances.sliced_wasserstein(real, real[:count])
    assert near == 0 if count == 300 else near < 0.5
    assert distances.sliced_wasserstein(real, real + 2) == pytest.approx(4, rel=0.15)


def test_sliced_wasserstein_in_one_dimension_agrees_with_scipy():
    real, fake = torch.randn(50, 1, generator=seeded(1)), torch.rand(50, 1, generator=seeded(2))
    ordered = np.sort(real[:, 0]) - np.sort(fake[:, 0])
    assert stats.wasserstein_distance(real[:, 0], fake[:, 0]) == pytest.approx(np.abs(ordered).mean(), rel=1e-5)
    assert distances.sliced_wasserstein(real, fake) == pytest.approx((ordered**2).mean(), rel=1e-5)


def test_precision_falls_with_additional_modes_and_recall_with_missing_modes():
    left, right = torch.rand(200, 2, generator=seeded(1)), torch.rand(200, 2, generator=seeded(2)) + 5
    both = torch.cat([left, right])

    def precision_recall(real, fake):
        radii_real, radii_fake = distances.neighbour_radii(real), distances.neighbour_radii(fake)
        return distances.coverage(fake, real, radii_real), distances.coverage(real, fake, radii_fake)

    fresh = torch.rand(200, 2, generator=seeded(3))
    precision, recall = precision_recall(both, fresh)  # one of two modes
    assert precision > 0.9
    assert 0.4 < recall < 0.5
    precision, recall = precision_recall(left, torch.cat([fresh, right]))  # an additional mode
    assert 0.4 < precision < 0.5
    assert recall > 0.9


def test_neighbour_radii_exclude_the_row_itself():
    rows = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert distances.neighbour_radii(rows, 1).tolist() == [1, 1, 2, 4]
    assert distances.neighbour_radii(rows, 3).tolist() == [7, 6, 4, 7]


def test_statistics_keep_the_first_rows_and_complete_blocks(monkeypatch):
    monkeypatch.setattr(statistics_module, "KEPT_ROWS", 25)
    rows = samples(107, 4).float()
    collected = Statistics(5, block=20)
    for part in torch.split(rows, 13):
        collected.add(part)
    assert torch.equal(collected.kept, rows[:25])
    assert collected.moments.count == 107
    assert [block.count for block in collected.full_blocks()] == [20] * 5
    np.testing.assert_allclose(collected.full_blocks()[3].covariance, np.cov(rows[60:80].double().T.numpy()), rtol=1e-9)
    again = Statistics.from_bytes(collected.to_bytes(), 107)
    assert torch.equal(again.kept, collected.kept)
    assert torch.equal(again.moments.covariance, collected.moments.covariance)


def test_the_number_of_blocks_is_limited():
    collected = Statistics(5, block=3)
    collected.add(samples(100, 4))
    assert len(collected.full_blocks()) == statistics_module.MAX_BLOCKS


def reference(train: torch.Tensor, held_out: torch.Tensor, floor_count: int | None = None) -> Reference:
    collected = Reference({"pixels": statistics_of(train)}, held_out, lambda: iter(torch.split(train, 7)), floor_count)
    collected.held_out_statistics = {"pixels": statistics_of(held_out)}
    return collected


def statistics_of(rows: torch.Tensor, block: int = 0) -> Statistics:
    collected = Statistics(rows.shape[1], block)
    collected.add(rows)
    return collected


def scores(samples: Evaluated) -> dict[str, float | None]:
    metrics = quality_metrics(["pixels"], samples.reference.floor_count)
    return {name: metric.compute(samples) for name, metric in metrics.items()}


def test_every_metric_has_its_value():
    train, held_out, fake = (samples(100, 1).float()[i::3] for i in range(3))
    ref = reference(train, held_out)
    radii = distances.neighbour_radii
    expected = {
        "frechet_distance_pixels": frechet(train, fake),
        "frechet_ratio_pixels": frechet(train, fake) / 2.0,
        "kid_pixels": distances.kernel_distance(train, fake),
        "frechet_distance_pixels_to_held_out": frechet(held_out, fake),
        "kid_pixels_to_held_out": distances.kernel_distance(held_out, fake),
        "precision_pixels": distances.coverage(fake, train, radii(train)),
        "recall_pixels": distances.coverage(train, fake, radii(fake)),
        "sliced_wasserstein": distances.sliced_wasserstein(train, fake),
        "memorisation": float(
            torch.cdist(fake, train).min(1).values.double().mean() / torch.cdist(held_out, train).min(1).values.mean()
        ),
        "label_agreement": 0.75,
        "endpoint_error": 0.1,
        "nfe": 2,
        "images_per_second": 500.0,
    }
    teacher = {"frechet_distance_pixels": 2.0}
    found = scores(Evaluated({"pixels": statistics_of(fake)}, ref, 0.75, 0.1, 2, 500.0, teacher))
    assert found == pytest.approx(expected, rel=1e-4)
    real = scores(Evaluated(ref.held_out_statistics, ref, 0.9))
    assert real["memorisation"] == 1
    assert real["frechet_distance_pixels_to_held_out"] == pytest.approx(frechet(held_out, train))
    assert real["kid_pixels_to_held_out"] == pytest.approx(distances.kernel_distance(held_out, train))
    missing = {"frechet_ratio_pixels", "endpoint_error", "nfe", "images_per_second"}
    assert {name for name, value in real.items() if value is None} == missing


def test_memorised_samples_have_a_small_memorisation_ratio():
    train, held_out = samples(100, 1).float()[:50], samples(100, 1).float()[50:]
    copies = Evaluated({"pixels": statistics_of(train + 0.001)}, reference(train, held_out))
    assert scores(copies)["memorisation"] < 0.05


def test_distances_are_computed_at_the_count_of_a_smaller_floor():
    train, fake = samples(100, 1).float(), samples(65, 3).float()
    ref = reference(train, train[:20], floor_count=20)
    name = "frechet_distance_pixels_at_floor_count"
    blocks = [frechet(train, part) for part in torch.split(fake[:60], 20)]
    assert scores(Evaluated({"pixels": statistics_of(fake, 20)}, ref))[name] == pytest.approx(sum(blocks) / 3)
    floor = scores(Evaluated({"pixels": statistics_of(train[:20], 20)}, ref))
    assert floor[name] == floor["frechet_distance_pixels"]
    assert name not in quality_metrics(["pixels"])


def test_columns_are_grouped_by_space_and_only_the_last_space_shows_precision():
    metrics = quality_metrics(["pixels", "classifier"], 355)
    headings = [metric.heading for metric in metrics.values() if metric.heading]
    grouped = "FD pixels,FD @355,ratio,FD classifier,FD @355,ratio,precision,recall,KID held-out,memory ratio,sliced W2"
    assert headings[:11] == grouped.split(",")
    many_held_out = [metric.heading for metric in quality_metrics(["pixels", "classifier"]).values() if metric.heading]
    assert "FD held-out" in many_held_out
    assert "KID held-out" not in many_held_out
    assert "kid_classifier" in metrics
    assert not any("{" in metric.name + metric.meaning + metric.heading for metric in metrics.values())
