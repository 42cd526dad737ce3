"""The student's endpoint loss and its few-step sampler."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kac.networks import NetworkConfig, build_network
from kac.student import endpoint_loss, sample


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


# Sampling


@pytest.mark.parametrize("steps", [1, 2, 4, 20])
def test_sampling_is_euler_in_macro_steps(steps):
    torch.manual_seed(0)
    network = build_network(NetworkConfig(width=16, depth=1), (1, 3, 3), 4)
    torch.nn.init.normal_(network.leave[1].weight)
    noise, label = torch.randn(6, 1, 3, 3), torch.tensor([0, 1, 2, 3, 4, 0])
    solution = sample(network, noise, label, steps)
    x = noise
    with torch.no_grad():
        for k in range(steps):
            x = x - network(x, torch.tensor(1 - k / steps), label) / steps
    torch.testing.assert_close(solution.x, x)
    assert solution.nfe == steps
    assert solution.knots is None


def test_sampling_calls_the_student_once_a_step_with_its_labels_and_no_graph():
    calls = []

    class Model:
        null_label = 4

        def __call__(self, x, t, label):
            calls.append((t.item(), label.tolist(), x.shape, torch.is_grad_enabled()))
            return x

    noise = torch.randn(3, 2, requires_grad=True)
    assert not sample(Model(), noise, torch.tensor([2, 0, 1]), 4).x.requires_grad
    assert calls == [(t, [2, 0, 1], (3, 2), False) for t in (1.0, 0.75, 0.5, 0.25)]


def test_a_student_without_loss_lands_where_the_teacher_does():
    """Loss and sampler share one convention: the velocities that make the loss zero carry the noise to the end."""
    knots = torch.randn(5, 3, 2, generator=seeded(2), dtype=torch.float64)  # the teacher's, t = 1 first

    class Student:
        null_label = 0

        def __call__(self, x, t, label):
            k = round(4 * (1 - float(t.flatten()[0])))
            return (knots[k] - knots[k + 1]) * 4

    for k in range(4):
        t_start, t_end = torch.full((3,), 1 - k / 4), torch.full((3,), 1 - (k + 1) / 4)
        loss = endpoint_loss(Student(), knots[k], knots[k + 1], t_start.double(), t_end.double(), torch.zeros(3))
        assert loss.item() < 1e-24
    torch.testing.assert_close(sample(Student(), knots[0], torch.zeros(3), 4).x, knots[4])


@pytest.mark.parametrize("steps", [0, -3])
def test_refuses_to_sample_without_steps(steps):
    with pytest.raises(ValueError, match="steps must be at least 1"):
        sample(lambda x, t, label: x, torch.zeros(1, 2), torch.zeros(1), steps)
