"""Reflow: straight lines between the ends of stored trajectories."""

import pytest
import torch

from kac.losses import Interval, ReflowConfig
from kac.losses.objectives import SHORTEST_PART


def test_only_the_ends_of_trajectories_are_read():
    objective = ReflowConfig().build(4)
    assert list(objective.knots(20)) == [0, 20]
    i, j = objective.draw(torch.rand(5, 2, dtype=torch.float64), 20)
    assert (i.tolist(), j.tolist()) == ([0] * 5, [1] * 5)
    assert objective.conditions == ("end_time",)


def test_targets_are_the_velocities_of_lines_at_random_times():
    generator = torch.Generator().manual_seed(0)
    start, end, error = torch.randn(3, 4000, 2, generator=generator, dtype=torch.float64)
    ones = torch.ones(4000, dtype=torch.float64)
    interval = Interval(start, end, ones, 0 * ones, torch.arange(4000), 0 * ones)
    seen = {}

    def network(x, t, label, end_time):
        seen.update(x=x, t=t, end_time=end_time)
        return start - end + error

    torch.manual_seed(1)
    losses = ReflowConfig().build(4).losses(network, interval).losses
    assert losses["reflow"].item() == pytest.approx(error.square().mean().item(), rel=1e-5)
    t = seen["t"]
    assert torch.allclose(seen["x"], end + t[:, None] * (start - end), atol=1e-6)
    assert (t - seen["end_time"]).min() >= SHORTEST_PART * (1 - 1e-6) and seen["end_time"].min() >= 0 and t.max() <= 1
    assert t.mean().item() == pytest.approx(0.51, abs=0.02)
