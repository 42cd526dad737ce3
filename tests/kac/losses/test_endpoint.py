"""Endpoint distillation: loss, knots and random intervals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kac.losses import EndpointConfig, EndpointObjective, Interval
from kac.losses.objectives import endpoint_loss as loss_of_interval
from kac.solvers import knot_times
from kac.util.errors import ArgumentError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def endpoint_loss(network, *interval) -> torch.Tensor:
    return loss_of_interval(network, Interval(*interval, torch.zeros(len(interval[0]))))


def intervals(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and end times of student steps of several lengths, [count] each."""
    steps = torch.randint(1, 21, (count,), generator=seeded(seed))
    k = (torch.rand(count, generator=seeded(seed + 1)) * steps).long()
    return 1 - k.double() / steps, 1 - (k + 1).double() / steps


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([(2,), (1, 4, 4)]))
def test_loss_is_the_squared_endpoint_error_over_the_squared_step_length(seed, shape):
    start, end = torch.randn(2, 9, *shape, generator=seeded(seed), dtype=torch.float64)
    t_start, t_end = intervals(9, seed)
    label = torch.arange(9)

    def model(x, t, label):
        return torch.sin(x) + (t + label).reshape(-1, *[1] * (x.ndim - 1))

    loss = endpoint_loss(model, start, end, t_start, t_end, label)
    h = (t_start - t_end).reshape(-1, *[1] * len(shape))
    predicted_end = start - h * model(start, t_start, label)
    assert loss.item() == pytest.approx(((predicted_end - end) ** 2 / h**2).mean().item(), rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32))
def test_exact_velocity_has_zero_loss(seed):
    start, u = torch.randn(2, 9, 3, generator=seeded(seed), dtype=torch.float64)
    t_start, t_end = intervals(9, seed)
    end = start - (t_start - t_end)[:, None] * u
    loss = endpoint_loss(lambda x, t, label: u, start, end, t_start, t_end, torch.zeros(9))
    assert loss.item() < 1e-24


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 1000), st.floats(0.01, 10), st.integers(0, 999))
def test_loss_has_the_same_scale_for_all_steps_and_intervals(steps, velocity_error, k):
    """A velocity error e gives the loss e^2 for any length and position of the interval."""
    k = torch.tensor([k % steps], dtype=torch.float64)
    t_start, t_end = 1 - k / steps, 1 - (k + 1) / steps
    start, u = torch.tensor([[0.3, -0.8]], dtype=torch.float64), torch.tensor([[1.5, 2.0]], dtype=torch.float64)
    end = start - u / steps
    loss = endpoint_loss(lambda x, t, label: u + velocity_error, start, end, t_start, t_end, torch.zeros(1))
    assert loss.item() == pytest.approx(velocity_error**2, rel=1e-6)


def test_the_network_is_evaluated_at_the_start_of_the_interval():
    seen = {}

    def model(x, t, label):
        seen.update(x=x, t=t, label=label)
        return x

    start, end = torch.randn(4, 2), torch.randn(4, 2)
    t_start, t_end, label = torch.full((4,), 0.75), torch.full((4,), 0.5), torch.arange(4)
    endpoint_loss(model, start, end, t_start, t_end, label)
    assert torch.equal(seen["x"], start)
    assert torch.equal(seen["t"], t_start)
    assert torch.equal(seen["label"], label)


def test_gradient_points_away_from_the_exact_velocity():
    u = torch.zeros(1, 2, requires_grad=True)
    start, end = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5, 1.25]])
    endpoint_loss(lambda x, t, label: u, start, end, torch.ones(1), torch.tensor([0.5]), torch.zeros(1)).backward()
    assert u.grad.tolist() == [[-1.0, 0.5]]  # the exact velocity is (1, -0.5), averaged over 2 coordinates


# The objective


@pytest.mark.parametrize(
    ("stored", "steps", "knots"), [(20, 4, [0, 5, 10, 15, 20]), (20, 1, [0, 20]), (3, 3, [0, 1, 2, 3])]
)
def test_objective_reads_the_knots_at_the_ends_of_steps(stored, steps, knots):
    objective = EndpointConfig().build(steps)
    assert list(objective.knots(stored)) == knots
    assert torch.equal(knot_times(stored)[objective.knots(stored)], knot_times(steps))


@pytest.mark.parametrize("steps", [0, 3, 21])
def test_refuses_steps_that_do_not_divide_the_knots(steps):
    with pytest.raises(ArgumentError, match=rf"`steps` {steps}.*20.*1, 2, 4, 5, 10, 20"):
        EndpointObjective(steps).knots(20)


def test_objective_draws_intervals_with_equal_probability():
    uniforms = torch.rand(40_000, 2, generator=seeded(1), dtype=torch.float64)
    start, end = EndpointObjective(4).draw(uniforms, 20)
    assert torch.equal(end, start + 1)
    assert torch.bincount(start).tolist() == pytest.approx([10_000] * 4, rel=0.05)
    limits = torch.tensor([[0.0, 0], [0.2499, 0], [0.25, 0], [0.9999, 0]])
    start, _ = EndpointObjective(4).draw(limits, 20)
    assert start.tolist() == [0, 0, 1, 3]


def test_objective_has_one_loss():
    interval = Interval(torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2), torch.full((2,), 0.5), *torch.zeros(2, 2))
    terms = EndpointObjective(2).losses(lambda x, t, label: x, interval)
    assert {name: value.item() for name, value in terms.losses.items()} == {"endpoint": 1.0}
    assert EndpointObjective(2).conditions == ()


def losses_of(error: torch.Tensor, **options) -> float:
    """Return the endpoint loss of a student with the velocity error ``error``."""
    start = torch.zeros_like(error)
    interval = Interval(start, start, torch.ones(len(error)), *torch.zeros(3, len(error)))
    objective = EndpointConfig(**options).build(1)
    return objective.losses(lambda x, t, label: error, interval).losses["endpoint"].item()


def test_huber_is_quadratic_for_small_and_linear_for_large_errors():
    error = torch.randn(1, 1, 4, 4, generator=seeded(0))
    error /= error.square().mean().sqrt()
    assert losses_of(error * 1e3, loss="huber") == pytest.approx(1e3, rel=1e-3)
    small = losses_of(error * 1e-3, loss="huber")
    assert losses_of(error * 2e-3, loss="huber") == pytest.approx(4 * small, rel=1e-2)


def test_huber_reduces_the_weight_of_an_outlier():
    error = torch.ones(10, 1, 4, 4)
    with_outlier = torch.cat([error, 10 * error[:1]])
    ratio = {loss: losses_of(with_outlier, loss=loss) / losses_of(error, loss=loss) for loss in ("mse", "huber")}
    assert ratio["huber"] < 2 < 9 < ratio["mse"]


def test_scales_average_the_loss_over_image_sizes():
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)[None, None]
    assert losses_of(checkers, scales=1) == pytest.approx(1)
    assert losses_of(checkers, scales=2) == pytest.approx(1 / 2)  # at half the size, the pattern averages to zero
    assert losses_of(torch.ones(2, 3, 8, 8), scales=4) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(1, 4, 4), (2,)])
def test_refuses_too_many_scales_for_the_image_size(shape):
    with pytest.raises(ArgumentError, match=r"`objective\.scales` 4"):
        losses_of(torch.ones(2, *shape), scales=4)
