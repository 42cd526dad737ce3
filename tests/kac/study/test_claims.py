"""The claims, on flows whose answers are known."""

import math

import numpy as np
import pytest
import torch

from kac.data import DataConfig, all_rows, open_dataset
from kac.guidance import guide
from kac.metrics.distances import frechet_distance
from kac.metrics.features import open_space
from kac.path import KacPath
from kac.sampling import Sampling
from kac.study.guidance_scales import effect_of_guidance
from kac.study.marginals import marginal, noised
from kac.study.memorisation import energy_and_nearness, spearman
from kac.study.plane import CELLS, density, distance_to, travel
from kac.study.solver_steps import moments_in, quality_by_solver
from kac.study.speed_limit import BINS, Speeds, speeds
from kac.study.stability import stability
from kac.util.errors import DistillKacError
from tests.kac.study.fields import Field, subject

EULER = Sampling(0.0, 8, "euler")


def noise_of(any_subject) -> torch.Tensor:
    return torch.cat([x_1 for x_1, _ in any_subject.starts()])


def test_a_student_that_is_off_by_a_constant_on_a_linear_flow_meets_its_bound():
    """Teacher x' = x, whose Euler steps of 1/8 shrink by 7/8 each; the student has the teacher's two steps and 0.1."""
    shrink = (1 - 1 / 8) ** 4
    teacher = subject(Field(lambda x, t: x), EULER)
    student = subject(Field(lambda x, t: x * (1 - shrink) / 0.5 - 0.2), Sampling(0.0, 2, "euler"), "student")
    first, middle, last = stability(teacher, student)
    assert (first.t, middle.t, last.t) == (1, 0.5, 0)
    assert (first.error, first.bound) == (0, 0)
    assert middle.error == pytest.approx(0.1, rel=1e-4)
    assert last.stretch == pytest.approx(shrink, rel=1e-4)
    assert last.step_error == pytest.approx(0.1, rel=1e-4)
    for value in (last.error, last.one_step, last.bound, last.certain):  # a linear flow: equality throughout
        assert value == pytest.approx(0.1 * (1 + shrink), rel=1e-4)
    assert all(knot.holds for knot in (first, middle, last))


def test_the_triangle_inequality_holds_on_any_flow_and_any_solver():
    teacher = subject(Field(lambda x, t: torch.sin(3 * x + t)), Sampling(0.0, 24, "ab2"))
    for steps in (1, 3, 8):
        student = subject(Field(lambda x, t: torch.tanh(2 * x)), Sampling(0.0, steps, "euler"))
        knots = stability(teacher, student)
        assert len(knots) == steps + 1
        assert all(knot.error <= knot.certain + 1e-6 for knot in knots)
        assert knots[1].bound == pytest.approx(knots[1].error, rel=1e-4)  # both begin at the same noise


def test_a_bound_of_steps_from_the_teachers_states_can_be_broken_by_a_student_that_is_worse_off_the_path():
    teacher = subject(Field(lambda x, t: torch.zeros_like(x)), EULER)

    def worse(x, t):
        away = x - noise_of(teacher)[: len(x)] if t < 1 else torch.ones_like(x) * 0.01
        return 30 * away if t < 1 else away

    student = subject(Field(worse), Sampling(0.0, 4, "euler"), count=20)
    knots = stability(teacher, student)
    assert [knot.holds for knot in knots] == [True, True, False, False, False]
    assert all(knot.error <= knot.certain + 1e-6 for knot in knots)


def test_steps_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="expected a multiple of 3 teacher's steps, found 8"):
        stability(subject(Field(lambda x, t: x), EULER), subject(Field(lambda x, t: x), Sampling(0.0, 3, "euler")))


def test_speeds_are_counted_coordinate_by_coordinate_at_every_evaluation():
    """One coordinate in two moves at 3 and the other at 5, which is beyond 4."""
    field = Field(lambda x, t: torch.stack([torch.full_like(x[:, 0], -3), torch.full_like(x[:, 0], 5)], 1))
    met = speeds(subject(field, Sampling(0.0, 8, "heun")), 4.0)
    assert met.count == 50 * 2 * 16
    assert (met.share_beyond, met.largest) == (0.5, 5)
    edges, heights = met.density()
    assert sum(heights) * (edges[1] - edges[0]) == pytest.approx(1)
    filled = [edge for edge, height in zip(edges, heights, strict=False) if height]
    assert filled == pytest.approx([3.0, 5.0], abs=0.1)
    assert len(heights) == BINS


def test_there_are_no_shares_beyond_a_limit_that_is_infinite():
    with pytest.raises(ValueError, match="expected a positive speed limit, found inf"):
        Speeds(math.inf)


def test_velocities_that_are_not_finite_are_refused():
    with pytest.raises(DistillKacError, match="expected finite velocities"):
        speeds(subject(Field(lambda x, t: x * math.nan), EULER), 4.0)


def test_quality_is_that_of_each_solver_at_its_own_cost():
    data = open_dataset(DataConfig(kind="moons"))
    pixels = open_space("pixels", data)
    train = moments_in([pixels], [all_rows(data.train).images])
    studied = subject(Field(lambda x, t: x), EULER, count=200)
    points = {(p.method, p.steps): p for p in quality_by_solver(studied, [pixels], train, steps=(5, 10))}
    assert {key: point.nfe for key, point in points.items()} == {
        **{("euler", n): n for n in (5, 10)},
        **{("heun", n): 2 * n for n in (5, 10)},
        **{("ab2", n): n for n in (5, 10)},
    }
    by_hand = frechet_distance(train["pixels"], moments_in([pixels], [noise_of(studied) * 0.8**5])["pixels"])
    assert points["euler", 5].distances["pixels"] == pytest.approx(by_hand, rel=1e-4)


def test_energy_and_values_out_of_range_grow_with_guidance():
    """Labels go up at 1 + w, the null label stays: all end below by that, and the energy is its square."""
    field = Field(lambda x, t: x, null_label=9)
    field.forward = lambda x, t, label: torch.where(label[:, None] == 9, 0.0, 1.0) * torch.ones_like(x)
    studied = subject(field, EULER)
    points = list(effect_of_guidance(studied, None, (0.0, 2.0)))
    assert [point.kinetic_energy for point in points] == pytest.approx([2, 18])
    ends = [noise_of(studied) - 1, noise_of(studied) - 3]
    assert [p.out_of_range for p in points] == pytest.approx([float((x.abs() > 1).double().mean()) for x in ends])
    assert [point.agreement for point in points] == [None, None]
    assert guide(field, 2.0, torch.zeros(3, dtype=torch.long)).nfe_per_call == 2


def test_agreement_is_that_of_the_classifier():
    data = open_dataset(DataConfig(kind="moons"))
    judge = open_space("classifier", data)
    still = subject(Field(lambda x, t: torch.zeros_like(x)), EULER)
    (point,) = effect_of_guidance(still, judge, (0.0,))
    label = torch.cat([label for _, label in still.starts()])
    named = judge.network.labels(judge(noise_of(still)))
    assert point.agreement == pytest.approx(float((named == label).double().mean()))


def test_rank_correlations_are_found_over_all_and_within_classes():
    """Within each class energies go against distances, over all of them with: the classes differ in both."""
    step = torch.arange(20.0)
    energy, distance = torch.cat([step, step + 100]), torch.cat([-step, 100 - step])
    label = torch.arange(40) // 20
    found = energy_and_nearness(energy, distance + 200, label)
    assert found.within_classes == pytest.approx(-1)
    assert found.correlation == pytest.approx(0.5, abs=0.02)
    assert (found.classes, found.p_value < 0.01) == (2, True)
    top = (distance + 200)[energy >= 118]
    assert found.energetic_ratio == pytest.approx(float(top.mean() / (distance + 200).mean()))
    ranks = spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 30, 20, 40]))[0]
    assert ranks == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert math.isnan(spearman(step, torch.ones(20))[0])


def test_noised_data_are_at_their_floor_and_others_are_not():
    data, path, generator = open_dataset(DataConfig(kind="moons")), KacPath(), torch.Generator().manual_seed(0)
    own = noised(path, data, 0.4, 2000, generator)
    right = marginal(own, 0.4, path, data, generator)
    wrong = marginal(own + 0.5, 0.4, path, data, generator)
    assert right.distance < 3 * right.floor
    assert wrong.distance == pytest.approx(0.5**2, rel=0.2)  # a shift of length 0.5 sqrt 2, averaged over directions
    rows = noised(path, data, 0.0, 50, generator)
    assert all((all_rows(data.train).images == row).all(1).any() for row in rows)


def test_ways_of_the_plane_have_their_speeds():
    studied = subject(Field(lambda x, t: torch.tensor([3.0, 4.0]).expand_as(x)), EULER)
    way = travel(studied)
    assert (way.x.shape, way.speed.shape) == ((9, 50, 2), (8, 50))
    assert way.t.tolist() == [1 - n / 8 for n in range(8)]
    assert torch.allclose(way.speed, torch.tensor(5.0))
    assert torch.allclose(way.samples, noise_of(studied) - torch.tensor([3.0, 4.0]), atol=1e-5)
    assert distance_to(way.samples, way.samples) == 0


def test_a_density_counts_points_from_below():
    counts = density(torch.tensor([[-1.19, -1.19], [-1.19, -1.19], [1.2, 0.0], [9.0, 0.0]]))
    assert counts.shape == (CELLS, CELLS)
    assert counts.sum() == 3
    assert np.argwhere(counts == 2).tolist() == [[2, 2]]
