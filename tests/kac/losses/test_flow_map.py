"""Flow maps: distribution of knot pairs, loss, and inputs of an any-step student."""

import pytest
import torch

from kac.losses import EndpointObjective, FlowMapConfig, FlowMapObjective, Interval, ReflowObjective
from kac.losses.objectives import GRID_SHARE, pair_probabilities
from kac.solvers import knot_times
from kac.util.errors import ArgumentError

LAWS = ["grids", "any", "length", "long"]
GRIDS = (1, 2, 4, 20)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("law", LAWS)
def test_pair_probabilities_are_upper_triangular_and_sum_to_one(law):
    p = pair_probabilities(law, GRIDS, 20)
    assert p.shape == (21, 21)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((p.tril() == 0).all())
    assert bool((p[torch.triu_indices(21, 21, offset=1).unbind()] > 0).all())


def test_pair_probabilities_match_the_name_of_their_law():
    lengths = torch.tensor([[j - i for j in range(21)] for i in range(21)])
    by_length = {
        law: [float(pair_probabilities(law, GRIDS, 20)[lengths == n].sum()) for n in range(1, 21)] for law in LAWS
    }
    pairs = [21 - n for n in range(1, 21)]
    assert by_length["any"] == pytest.approx([count / 210 for count in pairs])
    assert by_length["length"] == pytest.approx([1 / 20] * 20)
    weights = [n * count for n, count in zip(range(1, 21), pairs, strict=True)]
    assert by_length["long"] == pytest.approx([weight / sum(weights) for weight in weights])
    grids = pair_probabilities("grids", GRIDS, 20)
    assert float(grids[0, 20]) == pytest.approx(GRID_SHARE / 4 + (1 - GRID_SHARE) / 210)
    assert float(grids[5, 10]) == pytest.approx(GRID_SHARE / 16 + (1 - GRID_SHARE) / 210)
    assert float(grids[5, 11]) == pytest.approx((1 - GRID_SHARE) / 210)


@pytest.mark.parametrize("law", LAWS)
def test_draw_follows_the_pair_probabilities(law):
    uniforms = torch.rand(200_000, 2, generator=seeded(1), dtype=torch.float64)
    i, j = FlowMapObjective(pairs=law, grids=(1, 2)).draw(uniforms, 4)
    counts = torch.zeros(5, 5, dtype=torch.float64).index_put_((i, j), torch.tensor(1.0).double(), accumulate=True)
    assert torch.allclose(counts / 200_000, pair_probabilities(law, (1, 2), 4), atol=4e-3)


def test_draw_accepts_both_ends_of_the_unit_interval():
    uniforms = torch.tensor([[0.0, 0], [1 - 1e-17, 0]], dtype=torch.float64)
    i, j = FlowMapObjective(pairs="any").draw(uniforms, 20)
    assert (i.tolist(), j.tolist()) == ([0, 19], [1, 20])


def test_objective_reads_all_knots_and_refuses_grids_that_do_not_divide_them():
    assert list(FlowMapConfig().build(4).knots(20)) == list(range(21))
    with pytest.raises(ArgumentError, match=r"`objective\.grids` 3.*20"):
        FlowMapConfig(grids=(1, 3)).build(4).knots(20)
    assert list(FlowMapConfig(grids=(1, 3), pairs="any").build(4).knots(20)) == list(range(21))


def test_loss_is_the_squared_error_to_the_chord():
    times = knot_times(20).double()
    generator = seeded(3)
    start, end, error = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
    i, j = torch.tensor([0, 0, 3, 5, 19, 7]), torch.tensor([20, 1, 9, 10, 20, 8])
    interval = Interval(start, end, times[i], times[j], torch.arange(6), torch.full((6,), 2.0))
    seen = {}

    def student(x, t, label, end_time):
        seen.update(x=x, t=t, label=label, end_time=end_time)
        return (start - end) / (times[i] - times[j])[:, None] + error

    losses = FlowMapObjective().losses(student, interval).losses
    assert losses["flow_map"].item() == pytest.approx(error.square().mean().item())
    assert torch.equal(seen["end_time"], times[j])
    assert torch.equal(seen["t"], times[i])
    assert FlowMapObjective().conditions == ("end_time",)


def test_a_student_of_several_scales_receives_the_scale_of_each_pair():
    objective = FlowMapConfig().build(4, ("guidance",))
    assert objective.conditions == ("end_time", "guidance")
    scales = torch.tensor([0.0, 0.5, 2.0])
    interval = Interval(*torch.zeros(2, 3, 2), torch.ones(3), torch.zeros(3), torch.zeros(3), scales)

    def student(x, t, label, end_time, guidance):
        assert torch.equal(end_time, torch.zeros(3))
        return guidance[:, None].expand(3, 2)

    assert objective.losses(student, interval).losses["flow_map"].item() == pytest.approx(scales.square().mean().item())


def test_mean_lengths_of_intervals_are_fractions_of_the_trajectory():
    assert EndpointObjective(4).mean_length(20) == pytest.approx(1 / 4)
    assert ReflowObjective().mean_length(20) == 1
    expected = {"any": 22 / 3 / 20, "length": 10.5 / 20, "long": 16170 / 1540 / 20}
    for law, length in expected.items():
        assert FlowMapObjective(law).mean_length(20) == pytest.approx(length, rel=1e-3)
    grids = 0.75 * (1 + 1 / 2 + 1 / 4 + 1 / 20) / 4 + 0.25 * expected["any"]
    assert FlowMapObjective().mean_length(20) == pytest.approx(grids, rel=1e-3)
