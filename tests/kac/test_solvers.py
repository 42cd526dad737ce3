"""Solvers: orders of convergence, exactness, number of evaluations, kept states and refusals."""

import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kac.guidance import guide
from kac.solvers import GRIDS, SOLVERS, knot_times, solve

METHODS = sorted(SOLVERS)
ORDER = {"euler": 1, "heun": 2, "ab2": 2, "ab2-euler": 1}
CALLS = {"euler": 1, "heun": 2, "ab2": 1, "ab2-euler": 1}


def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return dx/dt = -2 t x^2, whose solutions are 1/x = t^2 + const."""
    return -2 * t * x**2


START = torch.tensor([[0.3, 0.5], [0.6, 0.7], [0.45, 0.55]], dtype=torch.float64)
EXACT = 1 / (1 / START - 1)


def exact_energy() -> torch.Tensor:
    """Return the integral of (2 t x^2)^2 over t in [0, 1], summed over the coordinates."""
    nodes = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None, None]
    speed = 2 * nodes / (nodes**2 + 1 / START - 1) ** 2
    return torch.trapezoid((speed**2).sum(2), dx=1 / 20_000, dim=0)


def grid(pattern: list[float], repeats: int) -> torch.Tensor:
    """Return a grid from 1 to 0 whose steps repeat the pattern. More repeats refine the grid but keep it uneven."""
    steps = torch.tensor(pattern * repeats, dtype=torch.float64)
    times = 1 - torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)]) / steps.sum()
    times[-1] = 0
    return times


def test_known_methods():
    assert METHODS == ["ab2", "ab2-euler", "euler", "heun"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [[1.0], [1.0, 2.0], [3.0, 1.0, 1.5, 0.7]], ids=str)
@pytest.mark.parametrize("what", ["state", "kinetic energy"])
def test_order_of_convergence(method, pattern, what):
    def error(repeats: int) -> float:
        solution = solve(field, START, grid(pattern, repeats), method)
        difference = solution.x - EXACT if what == "state" else solution.kinetic_energy - exact_energy()
        return difference.abs().max().item()

    coarse = 960 // len(pattern)
    assert math.log2(error(coarse) / error(2 * coarse)) == pytest.approx(ORDER[method], abs=0.1)


UNEVEN_GRIDS = st.lists(st.floats(0.05, 1), min_size=1, max_size=12).map(lambda steps: grid(steps, 1))


@settings(deadline=None, max_examples=50)
@given(UNEVEN_GRIDS, st.floats(-3, 3), st.floats(-3, 3))
def test_second_order_methods_are_exact_for_fields_linear_in_time(times, constant, slope):
    """The only error is that of AB-2's first step: an Euler step with the error slope h^2 / 2."""
    x = torch.zeros(1, 1, dtype=torch.float64)
    exact = -(constant + slope / 2)
    first_step = slope * (times[1] - times[0]).item() ** 2 / 2
    solved = {m: solve(lambda x, t: constant + slope * t + 0 * x, x, times, m).x.item() for m in METHODS}
    assert solved["heun"] == pytest.approx(exact, abs=1e-12)
    assert solved["ab2"] == pytest.approx(exact - first_step, abs=1e-12)
    assert solved["euler"] == pytest.approx(exact - slope / 2 * times.diff().square().sum().item(), abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(UNEVEN_GRIDS, st.floats(-5, 5))
def test_all_methods_are_exact_for_straight_trajectories(times, speed):
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    for method in METHODS:
        solution = solve(lambda x, t: torch.full_like(x, speed), x, times, method)
        torch.testing.assert_close(solution.x, x - speed, rtol=1e-12, atol=1e-12)
        assert solution.kinetic_energy.item() == pytest.approx(2 * speed**2, rel=1e-12, abs=1e-12)


def test_ab2_matches_its_formula_on_an_uneven_grid():
    times = torch.tensor([1.0, 0.7, 0.1, 0.0], dtype=torch.float64)
    x, previous, h_previous = START, None, None
    for t, t_next in itertools.pairwise(times):
        u, h = field(x, t), t_next - t
        if previous is None:
            x = x + h * u
        else:
            ratio = h / h_previous
            x = x + h * ((1 + ratio / 2) * u - ratio / 2 * previous)
        previous, h_previous = u, h
    torch.testing.assert_close(solve(field, START, times, "ab2").x, x, rtol=1e-14, atol=0)


def test_ab2_euler_takes_euler_steps_from_a_quarter_on():
    times = torch.tensor([1.0, 0.7, 0.3, 0.25, 0.2, 0.0], dtype=torch.float64)
    middle = solve(field, START, times[:4], "ab2").x
    expected = solve(field, middle, times[3:], "euler").x
    torch.testing.assert_close(solve(field, START, times, "ab2-euler").x, expected, rtol=1e-14, atol=0)


# Network evaluations


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_nfe_is_the_number_of_calls(method, steps):
    calls = []

    def counted(x, t):
        calls.append(t.item())
        return field(x, t)

    solution = solve(counted, START, knot_times(steps), method)
    assert solution.nfe == len(calls) == CALLS[method] * steps
    assert calls[0] == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_guided_call_counts_twice(method):
    class Model:
        null_label = 9

        def __call__(self, x, t, label):
            return x * t

    label = torch.zeros(3, dtype=torch.int64)
    assert solve(guide(Model(), 0.0, label), START, knot_times(5), method).nfe == 5 * CALLS[method]
    assert solve(guide(Model(), 1.5, label), START, knot_times(5), method).nfe == 10 * CALLS[method]


@pytest.mark.parametrize("method", METHODS)
def test_the_field_receives_scalar_grid_times_in_the_dtype_of_x(method):
    seen = []

    def spy(x, t):
        assert t.shape == ()
        assert t.dtype == x.dtype == torch.float32
        seen.append(t.item())
        return x

    times = grid([1.0, 2.0, 0.5], 1)
    solution = solve(spy, START.float(), times, method)
    assert solution.x.dtype == solution.kinetic_energy.dtype == torch.float32
    assert {round(t, 6) for t in seen} <= {round(t, 6) for t in times.tolist()}


# Kept states


@pytest.mark.parametrize("method", METHODS)
def test_keep_returns_the_requested_states_in_order(method):
    times = grid([1.0, 2.0], 3)
    states = [START] + [solve(field, START, times[: n + 1], method).x for n in range(1, 7)]
    solution = solve(field, START, times, method, keep=[6, 0, 3, 3])
    assert len(solution.knots) == 4
    assert all(torch.equal(kept, states[k]) for kept, k in zip(solution.knots, (6, 0, 3, 3), strict=True))
    assert torch.equal(solution.x, states[6])


def test_no_states_are_kept_by_default():
    assert solve(field, START, knot_times(3)).knots == []


@pytest.mark.parametrize("method", METHODS)
def test_intermediate_states_are_freed(method):
    """Whatever the length of the grid, only the solver's own states and the requested states stay in memory."""
    seen, alive = [], []

    def spy(x, t):
        seen.append(weakref.ref(x))
        alive.append(sum(state() is not None for state in seen))
        return x * t

    solve(spy, START + 0, knot_times(50), method)
    assert max(alive) <= 3
    seen.clear()
    alive.clear()
    solve(spy, START + 0, knot_times(50), method, keep=[0, 10, 20])
    assert max(alive) <= 6


def test_solve_does_not_modify_the_start():
    copy = START.clone()
    for method in METHODS:
        solve(field, START, knot_times(4), method, keep=[0, 4])
    assert torch.equal(START, copy)


# Grids and refusals


@pytest.mark.parametrize("grid_name", sorted(GRIDS))
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 500), st.integers(1, 40))
def test_a_grid_decreases_from_1_to_0_and_contains_coarser_grids(grid_name, knots, times_finer):
    times = knot_times(knots, grid_name)
    assert times.dtype == torch.float64
    assert len(times) == knots + 1
    assert (times[0].item(), times[-1].item()) == (1, 0)
    assert bool((times.diff() < 0).all())
    assert torch.equal(times, knot_times(knots * times_finer, grid_name)[::times_finer])


def test_uniform_grid_is_one_minus_k_over_knots():
    for knots in (1, 3, 20, 1000):
        even = [1 - k / knots for k in range(knots + 1)]
        torch.testing.assert_close(knot_times(knots), torch.tensor(even, dtype=torch.float64), rtol=0, atol=1e-15)


def test_quadratic_grid_squares_the_uniform_grid():
    for knots in (1, 3, 20, 1000):
        squares = [((knots - k) / knots) ** 2 for k in range(knots + 1)]
        torch.testing.assert_close(knot_times(knots, "quadratic"), torch.tensor(squares, dtype=torch.float64))


@pytest.mark.parametrize("knots", [0, -1])
def test_refuses_grids_without_knots(knots):
    with pytest.raises(ValueError, match=f"`knots` is {knots}"):
        knot_times(knots)
    with pytest.raises(ValueError, match=r"grid.*cosine"):
        knot_times(4, "cosine")


def test_refuses_an_unknown_method():
    with pytest.raises(ValueError, match=r"solver.*rk4.*ab2.*euler.*heun"):
        solve(field, START, knot_times(2), "rk4")


@pytest.mark.parametrize(
    "times",
    [[0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.0, 0.2, 0.3], [1.0], [], [1.0, math.nan, 0.0], [[1.0, 0.0], [1.0, 0.0]]],
    ids=str,
)
def test_refuses_grids_that_do_not_decrease(times):
    with pytest.raises(ValueError, match="`times`"):
        solve(field, START, torch.tensor(times, dtype=torch.float64))


@pytest.mark.parametrize("keep", [[-1], [0, 4], [7]])
def test_refuses_to_keep_indices_outside_the_grid(keep):
    with pytest.raises(ValueError, match="`keep`"):
        solve(field, START, knot_times(3), keep=keep)
