"""Endpoint distillation: its loss, its knots and its draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kac.losses import EndpointConfig, EndpointObjective, Interval, build_objective
from kac.losses.endpoint import endpoint_loss as loss_of_interval
from kac.solvers import knot_times
from kac.util.errors import ArgumentError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def endpoint_loss(network, *interval) -> torch.Tensor:
    return loss_of_interval(network, Interval(*interval, torch.zeros(len(interval[0]))))


def intervals(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Macro steps of several lengths, [count] each."""
    steps = torch.randint(1, 21, (count,), generator=seeded(seed))
    k = (torch.rand(count, generator=seeded(seed + 1)) * steps).long()
    return 1 - k.double() / steps, 1 - (k + 1).double() / steps


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([(2,), (1, 4, 4)]))
def test_loss_is_the_squared_endpoint_error_over_the_squared_step(seed, shape):
    start, end = torch.randn(2, 9, *shape, generator=seeded(seed), dtype=torch.float64)
    t_start, t_end = intervals(9, seed)
    label = torch.arange(9)

    def model(x, t, label):
        return torch.sin(x) + (t + label).reshape(-1, *[1] * (x.ndim - 1))

    loss = endpoint_loss(model, start, end, t_start, t_end, label)
    h = (t_start - t_end).reshape(-1, *[1] * len(shape))
    landed = start - h * model(start, t_start, label)
    assert loss.item() == pytest.approx(((landed - end) ** 2 / h**2).mean().item(), rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32))
def test_a_field_that_lands_exactly_has_no_loss(seed):
    start, u = torch.randn(2, 9, 3, generator=seeded(seed), dtype=torch.float64)
    t_start, t_end = intervals(9, seed)
    end = start - (t_start - t_end)[:, None] * u
    loss = endpoint_loss(lambda x, t, label: u, start, end, t_start, t_end, torch.zeros(9))
    assert loss.item() < 1e-24


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 1000), st.floats(0.01, 10), st.integers(0, 999))
def test_the_scale_is_one_for_all_steps_and_intervals(steps, velocity_error, k):
    """A velocity that is off by e costs e^2 whatever the interval's length and place."""
    k = torch.tensor([k % steps], dtype=torch.float64)
    t_start, t_end = 1 - k / steps, 1 - (k + 1) / steps
    start, u = torch.tensor([[0.3, -0.8]], dtype=torch.float64), torch.tensor([[1.5, 2.0]], dtype=torch.float64)
    end = start - u / steps
    loss = endpoint_loss(lambda x, t, label: u + velocity_error, start, end, t_start, t_end, torch.zeros(1))
    assert loss.item() == pytest.approx(velocity_error**2, rel=1e-6)


def test_the_model_is_asked_at_the_start_of_the_interval():
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


def test_its_slope_points_to_the_velocity_that_lands():
    u = torch.zeros(1, 2, requires_grad=True)
    start, end = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5, 1.25]])
    endpoint_loss(lambda x, t, label: u, start, end, torch.ones(1), torch.tensor([0.5]), torch.zeros(1)).backward()
    assert u.grad.tolist() == [[-1.0, 0.5]]  # the velocity that lands is (1, -0.5), and the mean is over 2


# The objective


@pytest.mark.parametrize(
    ("stored", "steps", "knots"), [(20, 4, [0, 5, 10, 15, 20]), (20, 1, [0, 20]), (3, 3, [0, 1, 2, 3])]
)
def test_it_reads_the_knots_at_the_ends_of_its_steps(stored, steps, knots):
    objective = build_objective(EndpointConfig(), steps)
    assert list(objective.knots(stored)) == knots
    assert torch.equal(knot_times(stored)[objective.knots(stored)], knot_times(steps))


@pytest.mark.parametrize("steps", [0, 3, 21])
def test_refuses_steps_that_do_not_divide_the_knots(steps):
    with pytest.raises(ArgumentError, match=rf"`steps`: expected a divisor of the store's 20 knots .*, found {steps}"):
        EndpointObjective(steps).knots(20)


def test_it_draws_each_of_its_intervals_as_often():
    uniforms = torch.rand(40_000, 2, generator=seeded(1), dtype=torch.float64)
    start, end = EndpointObjective(4).draw(uniforms, 20)
    assert torch.equal(end, start + 1)
    assert torch.bincount(start).tolist() == pytest.approx([10_000] * 4, rel=0.05)
    assert EndpointObjective(4).draw(torch.tensor([[0.0, 0], [0.2499, 0], [0.25, 0], [0.9999, 0]]), 20)[0].tolist() == [
        0,
        0,
        1,
        3,
    ]


def test_its_loss_has_one_part():
    interval = Interval(torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2), torch.full((2,), 0.5), *torch.zeros(2, 2))
    losses = EndpointObjective(2).losses(lambda x, t, label: x, interval)
    assert {name: value.item() for name, value in losses.items()} == {"endpoint": 1.0}
    assert EndpointObjective(2).conditions == ()


def losses_of(error: torch.Tensor, **options) -> float:
    """The endpoint loss of a student whose velocity is off by ``error``."""
    start = torch.zeros_like(error)
    interval = Interval(start, start, torch.ones(len(error)), *torch.zeros(3, len(error)))
    objective = EndpointConfig(**options).build(1)
    return objective.losses(lambda x, t, label: error, interval)["endpoint"].item()


def test_huber_is_quadratic_near_zero_and_grows_with_the_norm_far_from_it():
    error = torch.randn(1, 1, 4, 4, generator=seeded(0))
    error /= error.square().mean().sqrt()
    assert losses_of(error * 1e3, loss="huber") == pytest.approx(1e3, rel=1e-3)
    small = losses_of(error * 1e-3, loss="huber")
    assert losses_of(error * 2e-3, loss="huber") == pytest.approx(4 * small, rel=1e-2)


def test_an_outlier_weighs_less_under_huber():
    error = torch.ones(10, 1, 4, 4)
    with_outlier = torch.cat([error, 10 * error[:1]])
    ratio = {loss: losses_of(with_outlier, loss=loss) / losses_of(error, loss=loss) for loss in ("mse", "huber")}
    assert ratio["huber"] < 2 < 9 < ratio["mse"]


def test_scales_average_the_loss_of_ever_smaller_images():
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)[None, None]
    assert losses_of(checkers, scales=1) == pytest.approx(1)
    assert losses_of(checkers, scales=2) == pytest.approx(1 / 2)  # nothing is left of it at half the size
    assert losses_of(torch.ones(2, 3, 8, 8), scales=4) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(1, 4, 4), (2,)])
def test_more_scales_than_halvings_are_refused(shape):
    with pytest.raises(ArgumentError, match="scales"):
        losses_of(torch.ones(2, *shape), scales=4)
