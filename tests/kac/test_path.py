"""Paths: schedules, points and targets, moments, speed limits and refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kac.path import CLOCKS, SIGNALS, GaussianPath, KacPath, PathConfig
from kac.process import KacProcess
from kac.util.errors import ArgumentError
from kac.util.fingerprint import hashed_values

PATHS = [
    KacPath(),
    KacPath(KacProcess(9.0, 3.0), clock="linear"),
    KacPath(KacProcess(0.7, 4.0), clock="linear"),
    GaussianPath(),
]
SIGMAS = 6.0
"""Tolerance of Monte Carlo means in standard errors. The seeds are fixed."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_mean(values: torch.Tensor, expected: float) -> None:
    error = values.std().item() / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(expected, abs=SIGMAS * error)


# Schedules


@pytest.mark.parametrize("table", [SIGNALS, CLOCKS])
def test_derivatives_match_finite_differences(table):
    t = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    for schedule in table.values():
        slope = (schedule.value(t + 1e-5) - schedule.value(t - 1e-5)) / 2e-5
        torch.testing.assert_close(schedule.derivative(t), slope, rtol=0, atol=1e-9)


@pytest.mark.parametrize("table", [SIGNALS, CLOCKS])
def test_slope_bounds_are_the_largest_slopes(table):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for schedule in table.values():
        assert schedule.derivative(t).abs().max().item() == pytest.approx(schedule.slope_bound, abs=1e-12)


def test_schedules_at_both_ends():
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for signal in SIGNALS.values():
        assert (signal.value(zero).item(), signal.value(one).item()) == (1, 0)
    for clock in CLOCKS.values():
        assert clock.value(zero).item() == 0
        assert bool((clock.value(torch.linspace(0, 1, 101)).diff() > 0).all())


# The Kac path

CLOCK_NAMES = st.sampled_from(sorted(CLOCKS))


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 100), st.floats(0.1, 20), CLOCK_NAMES, st.integers(0, 2**32))
def test_points_and_targets_match_the_formula(a, c, clock, seed):
    """x_t = f x_0 + K_g and u_t = f' x_0 + g' v(K_g, g), with displacements from the same generator state."""
    path = KacPath(KacProcess(a, c), clock=clock)
    x_0 = torch.rand(6, 2, 3, generator=seeded(seed), dtype=torch.float64) * 2 - 1
    t = torch.rand(6, generator=seeded(seed + 1), dtype=torch.float64)
    point = path.sample(x_0, t, seeded(seed))

    t_each = t[:, None, None].expand(6, 2, 3)
    g, g_slope = (t_each, 1.0) if clock == "linear" else (t_each**2, 2 * t_each)
    k = KacProcess(a, c).sample(g, seeded(seed))
    v = KacProcess(a, c).velocity(k.displacement, g, k.is_atom)
    torch.testing.assert_close(point.x_t, (1 - t_each) * x_0 + k.displacement, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(point.target, g_slope * v - x_0, rtol=1e-12, atol=1e-12)
    assert torch.equal(point.t, t)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.1, 1000), st.floats(0.1, 20), CLOCK_NAMES, st.floats(0.1, 3), st.integers(0, 2**32))
def test_no_target_exceeds_the_speed_limit(a, c, clock, data_bound, seed):
    path = KacPath(KacProcess(a, c), clock=clock)
    x_0 = (torch.rand(256, 8, generator=seeded(seed)) * 2 - 1) * data_bound
    target = path.sample(x_0, torch.rand(256, generator=seeded(seed + 1)), seeded(seed + 2)).target
    assert target.abs().max().item() <= path.speed_limit(data_bound) * (1 + 1e-6)


@pytest.mark.parametrize("clock", sorted(CLOCKS))
def test_speed_limit_is_reached(clock):
    """The limit is tight: at t = 1, an atom whose data point has the opposite sign reaches it."""
    path = KacPath(KacProcess(0.5, 3.0), clock=clock)
    x_0 = 0.5 * torch.ones(64, 64).tril() - 0.5 * torch.ones(64, 64).triu()
    target = path.sample(x_0, torch.ones(64), seeded(0)).target
    assert target.abs().max().item() == pytest.approx(path.speed_limit(0.5), rel=1e-6)


def test_speed_limits():
    assert KacPath(KacProcess(9, 3), clock="linear").speed_limit() == 4
    assert KacPath(KacProcess(9, 3), clock="quadratic").speed_limit() == 7
    assert KacPath(KacProcess(9, 3), clock="linear").speed_limit(data_bound=2.0) == 5
    assert GaussianPath().speed_limit() == math.inf


# All paths


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.95])
def test_moments(path, t):
    """Mean f x_0, variance of the process, and E[u_t x_t] = d/dt E[x_t^2] / 2, as the continuity equation requires."""
    x_0 = 0.6
    point = path.sample(torch.full((200_000, 1), x_0, dtype=torch.float64), torch.tensor(t), seeded(1))
    x_t, target = point.x_t[:, 0], point.target[:, 0]

    def second_moment(s: float) -> float:
        s_ = torch.tensor(s, dtype=torch.float64)
        if isinstance(path, GaussianPath):
            return ((1 - s) * x_0) ** 2 + s**2
        return ((1 - s) * x_0) ** 2 + path.process.variance(s_ if path.clock == "linear" else s_**2).item()

    assert_mean(x_t, (1 - t) * x_0)
    assert_mean(x_t**2, second_moment(t))
    assert_mean(target, -x_0)
    assert_mean(target * x_t, (second_moment(t + 1e-5) - second_moment(t - 1e-5)) / 4e-5)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_path_at_both_ends(path):
    x_0 = torch.rand(5, 1, 4, 4) * 2 - 1
    assert torch.equal(path.sample(x_0, torch.tensor(0.0)).x_t, x_0)
    at_one = path.sample(x_0, torch.ones(5), seeded(2)).x_t
    assert torch.equal(at_one, path.sample(torch.zeros_like(x_0), torch.ones(5), seeded(2)).x_t)  # independent of x_0


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("t", [0.3, 1.0])
def test_point_has_the_distribution_of_sample(path, t):
    uniforms = torch.rand(path.uniforms_per_coordinate, 100_000, 1, generator=seeded(5), dtype=torch.float64).clamp(
        2**-53
    )
    x_0 = torch.full((100_000, 1), 0.4, dtype=torch.float64)
    points = path.point(x_0, t, uniforms)
    drawn = path.sample(x_0, torch.tensor(t, dtype=torch.float64), seeded(6)).x_t
    assert points.dtype == torch.float64
    assert stats.ks_2samp(points[:, 0].numpy(), drawn[:, 0].numpy(), method="asymp").pvalue > 1e-7
    torch.testing.assert_close(points, path.point(0.0, t, uniforms) + (1 - t) * 0.4)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_sample_uses_only_the_given_generator(path):
    x_0, t = torch.rand(4, 3), torch.rand(4)
    state = torch.get_rng_state()
    first, again = path.sample(x_0, t, seeded(7)), path.sample(x_0, t, seeded(7))
    assert torch.equal(first.x_t, again.x_t)
    assert torch.equal(first.target, again.target)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.3]), torch.full((4,), 0.3)])
def test_a_single_time_applies_to_the_whole_batch(path, t):
    x_0 = torch.rand(4, 1, 2)
    point, expected = path.sample(x_0, t, seeded(8)), path.sample(x_0, torch.full((4,), 0.3), seeded(8))
    assert torch.equal(point.x_t, expected.x_t)
    assert torch.equal(point.target, expected.target)
    assert torch.equal(point.t, torch.full((4,), 0.3))


def test_gaussian_target_points_from_the_data_to_the_noise():
    x_0, t = torch.rand(50, 3, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    point = GaussianPath().sample(x_0, t, seeded(9))
    torch.testing.assert_close(point.x_t - t[:, None] * point.target, x_0)
    eps = point.target + x_0
    assert stats.kstest(eps.flatten().numpy(), "norm").pvalue > 1e-7


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-12, 1 - 1e-12), st.floats(-1, 1), st.floats(0, 1))
def test_gaussian_points_are_quantiles_of_the_uniforms(u, x_0, t):
    point = GaussianPath().point(x_0, t, torch.tensor([[u]], dtype=torch.float64)).item()
    assert point == pytest.approx((1 - t) * x_0 + t * stats.norm.ppf(u), rel=1e-9, abs=1e-12)


# Refusals


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("shape", [(2,), (3,), (5,), (0,), (4, 1), (4, 2), (1, 1)])
def test_refuses_times_that_are_not_one_per_sample(path, shape):
    with pytest.raises(ValueError, match=r"`t`.*\[4\]") as error:
        path.sample(torch.zeros(4, 2), torch.full(shape, 0.5))
    assert str(list(shape)) in str(error.value)


def test_refuses_unknown_schedules():
    with pytest.raises(ValueError, match=r"signal.*cosine"):
        KacPath(signal="cosine")
    with pytest.raises(ValueError, match=r"clock.*cubic"):
        KacPath(clock="cubic")


# PathConfig


def test_config_builds_the_path_it_describes():
    assert PathConfig().build() == KacPath() == KacPath(KacProcess(25, 5), "linear", "quadratic")
    assert PathConfig(a=9, c=3, clock="linear").build() == KacPath(KacProcess(9, 3), "linear", "linear")
    assert PathConfig(kind="gaussian").build() == GaussianPath()


@pytest.mark.parametrize("bad", [{"a": 0}, {"c": -1}, {"a": math.nan}, {"c": math.inf}, {"kind": "levy"}, {"b": 1}])
def test_config_refuses_invalid_values(bad):
    with pytest.raises(ArgumentError, match=f"`{next(iter(bad))}`"):
        PathConfig(**bad)


def test_the_fingerprint_of_a_gaussian_path_stays():
    """Its defaults are those that older versions stored."""
    assert hashed_values(PathConfig(kind="gaussian")) == {"kind": "gaussian"}
