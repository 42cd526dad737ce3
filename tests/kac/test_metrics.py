"""Metrics against their formulas."""

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
from kac.metrics import statistics as kept


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(count: int, seed: int, size: int = 5) -> torch.Tensor:
    """Correlated samples [count, size] about a mean of their own."""
    mix = torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)
    mean = torch.randn(size, generator=seeded(seed + 1), dtype=torch.float64)
    return torch.randn(count, size, generator=seeded(seed + 2), dtype=torch.float64) @ mix + mean


def moments(rows: torch.Tensor, part: int = 150) -> Moments:
    made = Moments(rows.shape[1])
    for some in torch.split(rows, part):
        made.add(some)
    return made


def frechet(real: torch.Tensor, fake: torch.Tensor) -> float:
    return distances.frechet_distance(moments(real), moments(fake))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 400))
def test_moments_that_stream_are_those_of_all_rows(seed, size, part):
    rows = samples(400, seed, size)
    made = moments(rows, part)
    assert made.count == 400
    np.testing.assert_allclose(made.mean, rows.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(made.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-8, atol=1e-9)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31), st.integers(2, 9))
def test_frechet_distance_is_the_formula(seed, size):
    real, fake = samples(400, seed, size), samples(300, seed + 10, size)
    s_real, s_fake = np.cov(real.numpy(), rowvar=False), np.cov(fake.numpy(), rowvar=False)
    trace = np.trace(s_real + s_fake - 2 * linalg.sqrtm(s_real @ s_fake).real)
    mean = ((real.mean(0) - fake.mean(0)) ** 2).sum().item()
    assert frechet(real, fake) == pytest.approx(mean + trace, rel=1e-6, abs=1e-8)
    assert frechet(fake, real) == pytest.approx(frechet(real, fake), rel=1e-6, abs=1e-8)


def test_frechet_distance_is_torchmetrics_of_images_with_constant_pixels():
    """The digits' corners are blank in every image: their covariance has no full rank."""
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


def test_kernel_distance_is_the_unbiased_mmd_of_torchmetrics():
    real, fake = samples(80, 1), samples(80, 7)
    assert distances.kernel_distance(real, fake) == pytest.approx(float(poly_mmd(real, fake)), rel=1e-9)


@pytest.mark.parametrize("count", [300, 200, 37])
def test_sliced_wasserstein_of_a_shift_is_its_square_over_the_width(count):
    real = samples(300, 3).float()
    near = distances.sliced_wasserstein(real, real[:count])
    assert near == 0 if count == 300 else near < 0.5
    assert distances.sliced_wasserstein(real, real + 2) == pytest.approx(4, rel=0.15)


def test_sliced_wasserstein_of_a_line_is_scipys():
    real, fake = torch.randn(50, 1, generator=seeded(1)), torch.rand(50, 1, generator=seeded(2))
    ordered = np.sort(real[:, 0]) - np.sort(fake[:, 0])
    assert stats.wasserstein_distance(real[:, 0], fake[:, 0]) == pytest.approx(np.abs(ordered).mean(), rel=1e-5)
    assert distances.sliced_wasserstein(real, fake) == pytest.approx((ordered**2).mean(), rel=1e-5)


def test_precision_and_recall_see_what_is_missing_and_what_is_too_much():
    left, right = torch.rand(200, 2, generator=seeded(1)), torch.rand(200, 2, generator=seeded(2)) + 5
    both = torch.cat([left, right])

    def precision_recall(real, fake):
        radii_real, radii_fake = distances.neighbour_radii(real), distances.neighbour_radii(fake)
        return distances.coverage(fake, real, radii_real), distances.coverage(real, fake, radii_fake)

    fresh = torch.rand(200, 2, generator=seeded(3))
    precision, recall = precision_recall(both, fresh)  # one of two kinds
    assert precision > 0.9
    assert 0.4 < recall < 0.5
    precision, recall = precision_recall(left, torch.cat([fresh, right]))  # a kind of its own
    assert 0.4 < precision < 0.5
    assert recall > 0.9


def test_radii_leave_the_row_itself_out():
    rows = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert distances.neighbour_radii(rows, 1).tolist() == [1, 1, 2, 4]
    assert distances.neighbour_radii(rows, 3).tolist() == [7, 6, 4, 7]


def test_statistics_keep_the_first_rows_and_full_blocks(monkeypatch):
    monkeypatch.setattr(kept, "KEPT_ROWS", 25)
    rows = samples(107, 4).float()
    made = Statistics(5, block=20)
    for part in torch.split(rows, 13):
        made.add(part)
    assert torch.equal(made.kept, rows[:25])
    assert made.moments.count == 107
    assert [block.count for block in made.full_blocks()] == [20] * 5
    np.testing.assert_allclose(made.full_blocks()[3].covariance, np.cov(rows[60:80].double().T.numpy()), rtol=1e-9)
    again = Statistics.from_bytes(made.to_bytes(), 107)
    assert torch.equal(again.kept, made.kept)
    assert torch.equal(again.moments.covariance, made.moments.covariance)


def test_blocks_are_bounded():
    made = Statistics(5, block=3)
    made.add(samples(100, 4))
    assert len(made.full_blocks()) == kept.MAX_BLOCKS


def reference(train: torch.Tensor, held_out: torch.Tensor, floor_count: int | None = None) -> Reference:
    return Reference({"pixels": gathered(train)}, held_out, lambda: iter(torch.split(train, 7)), floor_count)


def gathered(rows: torch.Tensor, block: int = 0) -> Statistics:
    made = Statistics(rows.shape[1], block)
    made.add(rows)
    return made


def scores(judged: Evaluated) -> dict[str, float | None]:
    metrics = quality_metrics(["pixels"], judged.reference.floor_count)
    return {name: metric.compute(judged) for name, metric in metrics.items()}


def test_every_metric_is_that_of_its_name():
    train, held_out, fake = (samples(100, 1).float()[i::3] for i in range(3))
    by = reference(train, held_out)
    radii = distances.neighbour_radii
    expected = {
        "frechet_distance_pixels": frechet(train, fake),
        "frechet_ratio_pixels": frechet(train, fake) / 2.0,
        "kid_pixels": distances.kernel_distance(train, fake),
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
    found = scores(Evaluated({"pixels": gathered(fake)}, by, 0.75, 0.1, 2, 500.0, teacher))
    assert found == pytest.approx(expected, rel=1e-4)
    real = scores(Evaluated({"pixels": gathered(held_out)}, by, 0.9))
    assert real["memorisation"] == 1
    missing = {"frechet_ratio_pixels", "endpoint_error", "nfe", "images_per_second"}
    assert {name for name, value in real.items() if value is None} == missing


def test_memorised_samples_are_told():
    train, held_out = samples(100, 1).float()[:50], samples(100, 1).float()[50:]
    copies = Evaluated({"pixels": gathered(train + 0.001)}, reference(train, held_out))
    assert scores(copies)["memorisation"] < 0.05


def test_a_floor_of_fewer_images_has_a_distance_at_its_count():
    train, fake = samples(100, 1).float(), samples(65, 3).float()
    by = reference(train, train[:20], floor_count=20)
    name = "frechet_distance_pixels_at_floor_count"
    blocks = [frechet(train, part) for part in torch.split(fake[:60], 20)]
    assert scores(Evaluated({"pixels": gathered(fake, 20)}, by))[name] == pytest.approx(sum(blocks) / 3)
    floor = scores(Evaluated({"pixels": gathered(train[:20], 20)}, by))
    assert floor[name] == floor["frechet_distance_pixels"]
    assert name not in quality_metrics(["pixels"])


def test_metrics_of_several_spaces_stand_together_and_the_last_one_shows_precision():
    metrics = quality_metrics(["pixels", "classifier"], 355)
    headings = [metric.heading for metric in metrics.values() if metric.heading]
    assert headings[:9] == [
        *("FD pixels", "FD @355", "ratio", "FD classifier", "FD @355", "ratio", "precision", "recall", "sliced W2")
    ]
    assert "kid_classifier" in metrics
    assert not any("{" in metric.name + metric.meaning + metric.heading for metric in metrics.values())
