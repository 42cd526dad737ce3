"""The Kac process: 40-digit reference values, identities of its distribution, and samples."""

import json
import math
import random
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import Tensor

from kac.process import KacProcess

REFERENCE = json.loads((Path(__file__).parent / "reference.json").read_text())
DIGITS = 40
SIGNIFICANCE = 1e-7
"""Significance of the distribution tests. Seeds are fixed, so a test can only fail if torch changes its stream."""

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log(low), math.log(high)).map(math.exp)


RATES = log_uniform(0.1, 1000)
SPEEDS = log_uniform(0.1, 100)
TIMES = log_uniform(1e-6, 10)
SHARES = st.one_of(
    st.floats(-1, 1),
    st.sampled_from([-1.0, 0.0, 1.0]),
    log_uniform(1e-9, 1).map(lambda gap: 1 - gap),
    log_uniform(1e-9, 1).map(lambda gap: gap - 1),
)
"""x / ct, with many values near the edge of the cone."""


def f64(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def exact(a: float, c: float, t: float, x: float) -> dict[str, mpmath.mpf]:
    """Return the density, velocity and variance in 40-digit arithmetic. An x outside the cone is moved to its edge."""
    with mpmath.workdps(DIGITS):
        a, c, t = mpmath.mpf(a), mpmath.mpf(c), mpmath.mpf(t)
        x = max(-c * t, min(c * t, mpmath.mpf(x)))
        r = mpmath.sqrt((c * t - x) * (c * t + x))
        z = a * r / c
        i0, i1 = mpmath.besseli(0, z), mpmath.besseli(1, z)
        h = z * i0 / i1 if z else mpmath.mpf(2)
        i1_over_r = i1 / r if r else a / (2 * c)
        return {
            "velocity": a * x / (a * t + h),
            "density": a * mpmath.exp(-a * t) / (2 * c) * (i0 + c * t * i1_over_r),
            "variance": c**2 / (2 * a**2) * (2 * a * t - 1 + mpmath.exp(-2 * a * t)),
        }


def mixture_cdf(a: float, c: float, t: float, x: float) -> float:
    """Return P(K <= x) inside the cone as a sum over the number of reversals, computed without the density."""
    n = np.arange(1, int(a * t + 14 * math.sqrt(a * t) + 60))
    share = (x / (c * t) + 1) / 2
    first, second = n // 2 + 1, (n + 1) // 2
    forward = special.betainc(first, second, share)
    mirrored = 1 - special.betainc(first, second, 1 - share)
    return 0.5 * math.exp(-a * t) + float((stats.poisson.pmf(n, a * t) * (forward + mirrored) / 2).sum())


def integral(values_at, process: KacProcess, t: float) -> float:
    """Integrate over the cone, up to 15 standard deviations from the centre, with 64 panels of 20 nodes."""
    half = min(process.c * t, 15 * process.variance(f64(t)).sqrt().item())
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(-half, half, 65)
    middle, width = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    x = torch.from_numpy(middle[:, None] + width[:, None] * nodes)
    return float((values_at(x).numpy() * weights * width[:, None]).sum())


# Values


@pytest.mark.parametrize("row", REFERENCE, ids=lambda row: f"a={row['a']},c={row['c']},t={row['t']},x={row['x']}")
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_reference_values(row, dtype, relative):
    process = KacProcess(row["a"], row["c"])
    x, t = torch.tensor(row["x"], dtype=dtype), torch.tensor(row["t"], dtype=dtype)
    assert process.density(x, t).item() == pytest.approx(row["density"], rel=relative)
    assert process.velocity(x, t).item() == pytest.approx(row["velocity"], rel=relative)
    assert process.cdf(x, t).item() == pytest.approx(row["cdf"], rel=relative)
    assert process.variance(t).item() == pytest.approx(row["variance"], rel=relative)
    edge = process.c * t
    assert process.cdf(-edge, t).item() == pytest.approx(
        row["atom_mass_each_side"], rel=relative, abs=3e-45
    )  # fp32's last bit


@settings(deadline=None, max_examples=150)
@given(RATES, SPEEDS, TIMES, SHARES)
@example(53.67113981412426, 67.6624106614647, 1.910063468205847, 1.0)  # ct rounds up, so x is outside the cone
@example(1000.0, 3.0, 9.77, 1.0)
def test_single_precision_velocity_matches_40_digits(a, c, t, share):
    t32 = torch.tensor(t, dtype=torch.float32)
    for x in (torch.tensor(share * c * t, dtype=torch.float32), share * (c * t32)):
        expected = exact(a, c, t32.item(), x.item())["velocity"]
        error = abs(KacProcess(a, c).velocity(x, t32).item() - expected)
        assert error <= 1e-6 * c * max(1, a * t / 20)


@settings(deadline=None, max_examples=150)
@given(RATES, SPEEDS, TIMES, SHARES)
@example(100.0, 1.0, 0.005, 0.15)  # the end of the series' range, where the truncation error is largest
@example(7.0, 3.0, 0.0355, 0.0)
def test_double_precision_matches_40_digits(a, c, t, share):
    process, x = KacProcess(a, c), share * c * t
    expected = exact(a, c, t, x)
    assert process.velocity(f64(x), t).item() == pytest.approx(float(expected["velocity"]), rel=2e-9, abs=1e-300)
    assert process.variance(f64(t)).item() == pytest.approx(float(expected["variance"]), rel=2e-9)
    if abs(x) < c * t:
        assert process.density(f64(x), t).item() == pytest.approx(float(expected["density"]), rel=2e-9, abs=1e-290)


@settings(deadline=None, max_examples=100)
@given(RATES, SPEEDS, TIMES, st.floats(-1, 1))
@example(1000.0, 3.0, 9.7, 0.1)  # z and a t are both about 9,700, so their difference would lose all digits
def test_single_precision_density_matches_40_digits(a, c, t, share):
    t32 = torch.tensor(t, dtype=torch.float32)
    reach = min(0.999 * c * t, 5 * KacProcess(a, c).variance(f64(t)).sqrt().item())
    x = torch.tensor(share * reach, dtype=torch.float32)
    expected = float(exact(a, c, t32.item(), x.item())["density"])
    exponent = (a * x.item() / c) ** 2 / (a * t)  # the argument of exp(), which determines how many digits are lost
    assert KacProcess(a, c).density(x, t32).item() == pytest.approx(expected, rel=2e-6 * (1 + exponent), abs=1e-30)


@settings(deadline=None, max_examples=100)
@given(RATES, SPEEDS, TIMES, st.floats(-0.9999, 0.9999))
def test_cdf_matches_the_sum_over_reversals(a, c, t, share):
    x = share * c * t
    assert KacProcess(a, c).cdf(f64(x), t).item() == pytest.approx(mixture_cdf(a, c, t, x), abs=1e-9)


# The finite speed


@settings(deadline=None, max_examples=150)
@given(log_uniform(0.1, 1000), SPEEDS, log_uniform(1e-6, 1000), st.one_of(SHARES, st.floats(-5, 5)))
@example(6.0, 3.0, 1666.67, 1.0)
@example(600.0, 0.3, 100.1, -1.0)
def test_velocity_never_exceeds_c(a, c, t, share):
    for dtype in (torch.float32, torch.float64):
        t_ = torch.tensor(t, dtype=dtype)
        x = share * (c * t_) * torch.linspace(0.999, 1.001, 41, dtype=dtype)
        limit = torch.tensor(c, dtype=dtype)
        assert bool((KacProcess(a, c).velocity(x, t_).abs() <= limit).all())


@settings(deadline=None, max_examples=100)
@given(RATES, SPEEDS, TIMES)
@example(53.67113981412426, 67.6624106614647, 1.910063468205847)
def test_velocity_is_largest_at_the_edge_of_the_cone(a, c, t):
    process = KacProcess(a, c)
    for dtype, relative in ((torch.float32, 5e-7), (torch.float64, 1e-9)):
        t_ = torch.tensor(t, dtype=dtype)
        fastest = c * a * t_.double().item() / (a * t_.double().item() + 2)
        v = process.velocity(torch.linspace(-1, 1, 201, dtype=dtype) * (c * t_), t_)
        assert v.abs().max().item() <= fastest * (1 + relative)
        # ct is rounded, and the slope at the edge is steep. Beyond the edge, the velocity is constant.
        assert v.abs().max().item() == pytest.approx(fastest, rel=5e-7 + 1e-7 * a * t)
        beyond = process.velocity(torch.tensor([1.01, 2.0, 5.0], dtype=dtype) * (c * t_), t_)
        assert beyond.tolist() == pytest.approx([fastest] * 3, rel=relative)


@settings(deadline=None, max_examples=50)
@given(RATES, SPEEDS, TIMES)
def test_velocity_is_odd_and_increases_with_x(a, c, t):
    x = torch.linspace(-1, 1, 201, dtype=torch.float64) * (c * t)
    v = KacProcess(a, c).velocity(x, t)
    assert torch.equal(v, -KacProcess(a, c).velocity(-x, t))
    assert bool((v.diff() > 0).all())


@settings(deadline=None, max_examples=50)
@given(RATES, SPEEDS, TIMES)
def test_velocity_of_atoms_is_c_times_the_sign_of_x(a, c, t):
    process = KacProcess(a, c)
    x = torch.tensor([-1.0, 1.0, 0.3], dtype=torch.float32) * (c * t)
    v = process.velocity(x, t, torch.tensor([True, True, False]))
    c32 = torch.tensor(c, dtype=torch.float32)
    assert torch.equal(v, torch.stack([-c32, c32, process.velocity(x, t)[2]]))


def test_velocity_broadcasts_x_and_t():
    x, t = torch.rand(4, 1, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 1
    v = KacProcess().velocity(x, t)
    assert v.shape == (4, 3)
    assert v[2, 1].item() == KacProcess().velocity(x[2, 0], t[1]).item()


# Identities of the distribution

AT_PAIRS = st.tuples(log_uniform(0.1, 1000), SPEEDS, log_uniform(0.01, 3000)).map(lambda p: (p[0], p[1], p[2] / p[0]))
"""(a, c, t) with a t from 0.01 to 3000."""


@settings(deadline=None, max_examples=60)
@given(AT_PAIRS)
def test_integrals_of_the_density_match_closed_forms(act):
    a, c, t = act
    process, atom_mass = KacProcess(a, c), math.exp(-a * t)

    mass = integral(lambda x: process.density(x, t), process, t)
    assert mass == pytest.approx(-math.expm1(-a * t), rel=1e-9)

    variance = atom_mass * (c * t) ** 2 + integral(lambda x: x**2 * process.density(x, t), process, t)
    assert process.variance(f64(t)).item() == pytest.approx(variance, rel=2e-8)

    power = atom_mass * c * c * t + integral(lambda x: x * process.velocity(x, t) * process.density(x, t), process, t)
    assert power == pytest.approx(-(c**2) / (2 * a) * math.expm1(-2 * a * t), rel=2e-8)


@settings(deadline=None, max_examples=60)
@given(AT_PAIRS, st.floats(-0.95, 0.95))
def test_continuity_equation(act, share):
    """d/dt P(K_t < q) = -p(q) v(q), with a fourth-order central difference."""
    a, c, t = act
    process, q, dt = KacProcess(a, c), f64(share * c * t), 1e-3 * t * (1 - abs(share))
    times = t + dt * f64([-2, -1, 1, 2])
    change = (process.cdf(q.expand(4), times) * f64([1, -8, 8, -1])).sum().item() / (12 * dt)
    flow = -(process.density(q, t) * process.velocity(q, t)).item()
    assert change == pytest.approx(flow, rel=1e-6, abs=1e-6 / t)


@settings(deadline=None, max_examples=60)
@given(AT_PAIRS)
def test_cdf_is_monotone_with_correct_edge_values(act):
    a, c, t = act
    process, edge, atom = KacProcess(a, c), f64(c * t), 0.5 * math.exp(-a * t)
    assert bool((process.cdf(torch.linspace(-1.1, 1.1, 221, dtype=torch.float64) * edge, t).diff() >= -1e-12).all())
    just_inside = torch.nextafter(edge, f64(0.0))
    assert process.cdf(-1.0001 * edge, t).item() == 0
    assert process.cdf(-edge, t).item() == pytest.approx(atom, rel=1e-12)
    assert process.cdf(-just_inside, t).item() == pytest.approx(atom, abs=1e-10)
    assert process.cdf(f64(0.0), t).item() == 0.5
    assert process.cdf(just_inside, t).item() == pytest.approx(1 - atom, abs=1e-10)
    assert process.cdf(edge, t).item() == 1
    x = torch.linspace(0.01, 0.99, 99, dtype=torch.float64) * edge
    torch.testing.assert_close(process.cdf(x, t) + process.cdf(-x, t), torch.ones_like(x), rtol=0, atol=1e-12)


def test_density_is_zero_outside_the_cone():
    x = f64([-4.0, -3.0001, 3.0001, 50.0])
    assert torch.equal(KacProcess(9, 3).density(x, 1.0), torch.zeros_like(x))


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a", [0.1, 9.0, 1000.0])
def test_gradients_are_finite_everywhere(dtype, a):
    process = KacProcess(a, 3.0)
    times = torch.tensor([0.0, 1e-6, 0.02, 0.5, 1.0, 10.0], dtype=dtype)
    shares = torch.tensor([-1.01, -1.0, -1 + 1e-7, -0.5, 0.0, 0.3, 0.999999, 1.0, 1.01], dtype=dtype)
    t = times[:, None].expand(-1, len(shares)).clone().requires_grad_()
    x = (shares * 3.0 * times[:, None]).requires_grad_()
    for is_atom in (None, (shares.abs() == 1).expand(t.shape)):
        for gradient in torch.autograd.grad(process.velocity(x, t, is_atom).sum(), (x, t)):
            assert bool(gradient.isfinite().all())


def test_gradients_are_correct_on_both_branches():
    process = KacProcess(9.0, 3.0)
    x, t = f64([0.01, 0.02, 0.0, 0.5, -1.3, 2.9]).requires_grad_(), f64([0.01, 0.02, 0.03, 0.3, 0.6, 1.0])
    z_squared = 9 * (9 * t**2 - x.detach() ** 2)
    assert {*(z_squared < 0.25).tolist()} == {True, False}
    assert torch.autograd.gradcheck(process.velocity, (x, t.requires_grad_()), eps=1e-7, atol=1e-6)


# Samples

_numbers = np.random.default_rng(20)
RANDOM_PROCESSES = [
    (10 ** _numbers.uniform(-1, 3), 10 ** _numbers.uniform(-1, 2), 10 ** _numbers.uniform(-2, 1)) for _ in range(6)
]
LAWS = [(9.0, 3.0, 1.0), (9.0, 3.0, 0.05), (0.7, 4.0, 0.9), (2.0, 1.0, 2.0), *RANDOM_PROCESSES]
COUNT = 100_000


def assert_follows_the_cdf(process: KacProcess, t: float, k: Tensor) -> None:
    """Apply a Kolmogorov-Smirnov test at 301 points, a lower bound of the distance. Neighbours must be uncorrelated."""
    reach = min(0.9999 * process.c * t, 6 * process.variance(f64(t)).sqrt().item())
    grid = torch.linspace(-reach, reach, 301, dtype=torch.float64)
    empirical = torch.searchsorted(k.double().sort().values, grid, right=True) / len(k)
    distance = (empirical - process.cdf(grid, t)).abs().max().item()
    assert distance < math.sqrt(math.log(2 / SIGNIFICANCE) / (2 * len(k)))
    neighbours = torch.corrcoef(torch.stack([k[:-1], k[1:]]).double())[0, 1].item()
    assert abs(neighbours) < stats.norm.isf(SIGNIFICANCE / 2) / math.sqrt(len(k))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("a", "c", "t"), LAWS)
def test_samples_follow_the_cdf(a, c, t, dtype, device):
    generator = torch.Generator(device).manual_seed(11)
    draw = KacProcess(a, c).sample(torch.full((COUNT,), t, dtype=dtype, device=device), generator)
    assert_follows_the_cdf(KacProcess(a, c), t, draw.displacement.cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("a", "c", "t"), [(9.0, 3.0, 0.01), (9.0, 3.0, 0.5), (0.7, 4.0, 0.9), (1000.0, 5.0, 0.002)])
def test_atoms_have_the_expected_frequency_on_each_side(a, c, t, device):
    generator = torch.Generator(device).manual_seed(12)
    draw = KacProcess(a, c).sample(torch.full((COUNT,), t, device=device), generator)
    up = int((draw.is_atom & (draw.displacement > 0)).sum())
    down = int((draw.is_atom & (draw.displacement < 0)).sum())
    atom = 0.5 * math.exp(-a * t)
    expected = np.array([atom, atom, 1 - 2 * atom]) * COUNT
    assert stats.chisquare([up, down, COUNT - up - down], expected).pvalue > SIGNIFICANCE


@settings(deadline=None, max_examples=40)
@given(RATES, SPEEDS, st.integers(0, 2**32))
def test_only_atoms_are_on_the_edge(a, c, seed):
    t = torch.rand(2000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 / a
    draw = KacProcess(a, c).sample(t, torch.Generator().manual_seed(seed))
    edge = c * t
    assert bool((draw.displacement.abs() <= edge).all())
    assert torch.equal(draw.is_atom, draw.displacement.abs() == edge)
    single = KacProcess(a, c).sample(t.float(), torch.Generator().manual_seed(seed))
    assert bool((single.displacement.abs() <= c * t.float()).all())
    assert torch.equal(single.displacement.abs()[single.is_atom], (c * t.float())[single.is_atom])


@pytest.mark.parametrize("device", DEVICES)
def test_sample_uses_only_the_given_generator(device):
    generator = torch.Generator(device).manual_seed(3)
    state = generator.get_state()
    t = torch.rand(1000, device=device)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    first = KacProcess().sample(t, generator)
    assert not torch.equal(generator.get_state(), state)
    second = KacProcess().sample(t, generator.set_state(state))
    assert torch.equal(first.displacement, second.displacement)
    assert torch.equal(first.is_atom, second.is_atom)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_sample_uses_the_global_generator_by_default():
    torch.manual_seed(4)
    first = KacProcess().sample(torch.ones(100)).displacement
    torch.manual_seed(4)
    assert torch.equal(KacProcess().sample(torch.ones(100)).displacement, first)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4), (0,), (3, 0)])
def test_samples_have_the_shape_and_dtype_of_t(shape):
    for dtype in (torch.float32, torch.float64):
        draw = KacProcess().sample(torch.full(shape, 0.5, dtype=dtype))
        assert draw.displacement.shape == draw.is_atom.shape == shape
        assert draw.displacement.dtype == dtype
        assert draw.is_atom.dtype == torch.bool
    assert KacProcess().sample(0.5).displacement.shape == ()


def test_sample_does_not_modify_t():
    t = torch.rand(50)
    copy = t.clone()
    KacProcess().sample(t)
    assert torch.equal(t, copy)


def test_each_sample_uses_its_own_time():
    t = torch.tensor([0.0, 0.2, 1.0], dtype=torch.float64)[:, None].expand(3, COUNT)
    k = KacProcess().sample(t, torch.Generator().manual_seed(5)).displacement
    assert_follows_the_cdf(KacProcess(), 0.2, k[1])
    assert_follows_the_cdf(KacProcess(), 1.0, k[2])


def test_displacement_is_zero_at_time_zero():
    draw = KacProcess().sample(torch.zeros(1000))
    assert torch.equal(draw.displacement, torch.zeros(1000))
    assert bool(draw.is_atom.all())


# Samples from uniforms


def some_uniforms(count: int, seed: int) -> Tensor:
    return torch.rand(3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(2**-53)


@pytest.mark.parametrize(("a", "c", "t"), LAWS)
def test_from_uniforms_has_the_distribution_of_sample(a, c, t):
    process = KacProcess(a, c)
    k = process.from_uniforms(some_uniforms(COUNT, 21), t)
    assert_follows_the_cdf(process, t, k)
    drawn = process.sample(torch.full((COUNT,), t, dtype=torch.float64), torch.Generator().manual_seed(22))
    assert stats.ks_2samp(k.numpy(), drawn.displacement.numpy(), method="asymp").pvalue > SIGNIFICANCE


@settings(deadline=None, max_examples=40)
@given(RATES, SPEEDS, TIMES, st.integers(0, 2**32))
def test_a_particle_depends_only_on_its_own_uniforms(a, c, t, seed):
    process, uniforms = KacProcess(a, c), some_uniforms(100, seed)
    k = process.from_uniforms(uniforms, t)
    assert k.dtype == torch.float64
    assert bool((k.abs() <= c * t).all())
    assert torch.equal(process.from_uniforms(uniforms, t), k)
    assert torch.equal(process.from_uniforms(uniforms[:, 37:41], t), k[37:41])
    assert torch.equal(process.from_uniforms(uniforms.flip(1), t), k.flip(0))
    assert torch.equal(process.from_uniforms(uniforms.reshape(3, 4, 5, 5), t), k.reshape(4, 5, 5))


@settings(deadline=None, max_examples=40)
@given(log_uniform(0.01, 3000), st.floats(-6, 6), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
@example(9.0, 6.0, 0.5, 0.1)
def test_first_uniform_selects_the_number_of_reversals(rate, sigmas, u, v):
    """N is the Poisson quantile, tested to six standard deviations, and K = ct sqrt(1 - U^(2/(2k-1))) cos 2 pi V."""
    n = max(1, round(rate + sigmas * math.sqrt(rate)))
    below, above = stats.poisson.cdf([n - 1, n], rate)
    middle = (below + above) / 2
    assume(below + 1e-9 < middle < above - 1e-9)
    k = KacProcess(rate, 2.0).from_uniforms(f64([[middle], [u], [v]]), 1.0)
    expected = 2 * math.sqrt(1 - u ** (2 / (2 * math.ceil(n / 2) - 1))) * math.cos(2 * math.pi * v)
    assert k.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_first_uniform_below_the_atom_mass_means_no_reversal():
    """Up to exp(-a t) the particle is on the edge. The third uniform selects the side."""
    atom_mass = math.exp(-9 * 0.5)
    uniforms = f64([[atom_mass * 0.999, atom_mass * 0.999, atom_mass * 1.001], [0.5, 0.5, 0.5], [0.2, 0.8, 0.2]])
    k = KacProcess(9, 3).from_uniforms(uniforms, 0.5)
    assert k[:2].tolist() == [1.5, -1.5]
    assert abs(k[2].item()) < 1.5


def test_from_uniforms_is_zero_at_time_zero():
    assert torch.equal(KacProcess().from_uniforms(some_uniforms(20, 0), 0.0), torch.zeros(20, dtype=torch.float64))


# Refusals


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_rate_and_speed_must_be_positive_and_finite(bad):
    with pytest.raises(ValueError, match=rf"`a` is {bad}"):
        KacProcess(a=bad)
    with pytest.raises(ValueError, match=rf"`c` is {bad}"):
        KacProcess(c=bad)


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf])
def test_times_must_be_finite_and_not_negative(bad):
    with pytest.raises(ValueError, match="`t`"):
        KacProcess().sample(torch.tensor([0.5, bad]))
