"""The flow-matching loss: its value, its known minimum, and random times and labels."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from kac.losses.flow_matching import drop_labels, flip, flow_matching_loss, stratified_times
from kac.networks import MLPConfig, build_network
from kac.path import GaussianPath, KacPath, PathSample
from kac.process import KacProcess

NULL = 10


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_null_label(field):
    field.null_label = NULL
    return field


class Recorded:
    """A path that records its last sample."""

    def __init__(self, path: KacPath | GaussianPath):
        self.path = path
        self.point: PathSample | None = None

    def sample(self, x_0: Tensor, t: Tensor, generator: torch.Generator) -> PathSample:
        self.point = self.path.sample(x_0, t, generator)
        return self.point


class Spy:
    """Computes u(x, t, label) = 0.3 x - t + label / 10, and records its last call."""

    null_label = NULL

    def __call__(self, x, t, label):
        self.x, self.t, self.label = x, t, label
        shape = (-1, *[1] * (x.ndim - 1))
        return 0.3 * x - t.reshape(shape) + label.reshape(shape) / 10


@pytest.mark.parametrize("path", [KacPath(), KacPath(clock="linear"), GaussianPath()], ids=str)
def test_loss_is_the_mean_squared_error_of_the_velocity(path):
    recorded, spy = Recorded(path), Spy()
    x_0, t, label = torch.rand(64, 1, 3, 3) * 2 - 1, torch.rand(64), torch.randint(0, 10, (64,))
    loss = flow_matching_loss(spy, recorded, x_0, t, label, seeded(1))
    assert torch.equal(spy.x, recorded.point.x_t)
    assert torch.equal(spy.t, recorded.point.t)
    errors = (Spy()(spy.x, spy.t, spy.label) - recorded.point.target).double()
    assert loss.shape == ()
    assert loss.item() == pytest.approx((errors**2).sum().item() / (64 * 9), rel=1e-5)


def test_loss_uses_only_the_given_generator():
    x_0, t, label = torch.rand(32, 2), torch.rand(32), torch.randint(0, 10, (32,))
    state = torch.get_rng_state()
    losses = [flow_matching_loss(Spy(), KacPath(), x_0, t, label, seeded(seed)).item() for seed in (2, 2, 3)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_times_are_stratified_uniform_and_in_random_order():
    generator = seeded(4)
    for count in (1, 7, 256):
        t = stratified_times(count, generator)
        assert 0 <= t.min().item() <= t.max().item() <= 1
        assert torch.equal((t.sort().values * count).floor().long(), torch.arange(count))
    within = torch.cat([stratified_times(256, generator) * 256 % 1 for _ in range(20)])
    assert stats.kstest(within.numpy(), "uniform").pvalue > 1e-7
    first = torch.stack([stratified_times(16, generator)[0] for _ in range(500)])
    assert stats.kstest(first.numpy(), "uniform").pvalue > 1e-7  # the order of the strata is random


def test_drop_labels_and_flip_change_only_selected_samples():
    is_selected = torch.tensor([True, False, True])
    assert drop_labels(torch.tensor([4, 5, 6]), is_selected, NULL).tolist() == [NULL, 5, NULL]
    images = torch.arange(18.0).reshape(3, 1, 2, 3)
    flipped = flip(images, is_selected)
    assert flipped[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert torch.equal(flipped[1], images[1])


# The known minimum


def kac_oracle(process: KacProcess, points: Tensor):
    """Return E[u_t | x_t] for data that is uniform over ``points``, computed from the density and the atoms."""

    def field(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        t = t[:, None].double()
        k = x - (1 - t) * points  # [batch, points]
        on_edge = (k.abs() - process.c * t).abs() < 1e-12
        # An atom has infinite weight relative to a density.
        weight = torch.where(on_edge.any(1, keepdim=True), on_edge.double(), process.density(k, t))
        u = process.velocity(k, t, on_edge) - points
        return ((weight * u).sum(1) / weight.sum(1))[:, None]

    return field


def test_exact_field_of_a_single_image_has_zero_loss():
    x_0 = torch.full((5000, 1), 0.4, dtype=torch.float64)
    path, label = KacPath(KacProcess(3.0, 2.0), clock="linear"), torch.zeros(5000, dtype=torch.int64)
    oracle = kac_oracle(path.process, torch.tensor([0.4], dtype=torch.float64))
    t = stratified_times(5000, seeded(7))
    assert flow_matching_loss(with_null_label(oracle), path, x_0, t, label, seeded(7)).item() < 1e-20


@pytest.mark.parametrize("process", [KacProcess(9.0, 3.0), KacProcess(1.0, 1.5)], ids=str)
def test_conditional_expectation_minimises_the_loss(process):
    """Adding phi to the exact field raises the loss by exactly E phi^2, because the error is orthogonal to phi."""
    points = torch.tensor([-0.7, 0.5], dtype=torch.float64)
    x_0 = points.repeat(20_000)[:, None]
    label = torch.zeros(len(x_0), dtype=torch.int64)
    oracle, recorded = kac_oracle(process, points), Recorded(KacPath(process, clock="linear"))

    def loss(field) -> float:
        t = stratified_times(len(x_0), seeded(7))
        return flow_matching_loss(with_null_label(field), recorded, x_0, t, label, seeded(8)).item()

    best = loss(oracle)
    x, t = recorded.point.x_t, recorded.point.t
    residual = oracle(x, t, label) - recorded.point.target
    assert best == pytest.approx(residual.square().mean().item(), rel=1e-12)
    for phi in (
        lambda x, t: torch.sin(3 * x + 5 * t[:, None]),
        lambda x, t: x,
        lambda x, t: (x.abs() > 0.5).double() * t[:, None],
        lambda x, t: oracle(x, t, None),
    ):
        cost = phi(x, t).square().mean().item()
        error = 2 * (residual * phi(x, t)).std().item() / math.sqrt(len(x))
        changed = loss(lambda x, t, label, phi=phi: oracle(x, t, label) + phi(x, t))
        assert changed - best == pytest.approx(cost, abs=6 * error)


def test_training_reaches_the_known_minimum():
    """For normal data and the Gaussian path, Var(u_t | x_t) = 1 / ((1-t)^2 + t^2), whose mean over t is pi / 2.

    Training starts at the zero field, whose loss is 2.
    """
    torch.manual_seed(0)
    network = build_network(MLPConfig(width=32, depth=1), (2,), NULL)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    generator = seeded(9)

    def loss(count: int) -> Tensor:
        x_0 = torch.randn(count, 2, generator=generator)
        label = torch.zeros(count, dtype=torch.int64)
        return flow_matching_loss(network, GaussianPath(), x_0, stratified_times(count, generator), label, generator)

    with torch.no_grad():
        assert loss(50_000).item() == pytest.approx(2, abs=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss(512).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss(200_000).item() == pytest.approx(math.pi / 2, rel=0.02)
