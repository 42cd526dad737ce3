"""The claims, measured on flows with known results."""

import itertools
import math

import numpy as np
import pytest
import torch

from kac.data import DataConfig, all_rows, open_dataset
from kac.guidance import guide
from kac.metrics import Statistics
from kac.metrics.distances import frechet_distance
from kac.metrics.features import open_space
from kac.networks import DiTConfig, NetworkConfig, UNetConfig, build_network
from kac.path import KacPath, PathConfig
from kac.process import KacProcess
from kac.sampling import Sampling
from kac.solvers import knot_times
from kac.study.compute import rollout_calls, student_cost, students_to_pay
from kac.study.guidance_scales import effect_of_guidance
from kac.study.marginals import marginal, noised
from kac.study.memorisation import energy_and_nearness, spearman
from kac.study.paths import KNOTS, Spread, follow, lipschitz, spectral_norms
from kac.study.plane import CELLS, density, travel
from kac.study.solver_steps import quality_by_solver
from kac.study.speed_limit import BINS, speeds
from kac.study.stability import stability
from kac.study.subject import Training, Trajectories, Watched
from kac.util.errors import DivergedError
from tests.kac.study.fields import Field, config, subject

EULER = Sampling(0.0, 8, "euler")
LINEAR = KacPath(KacProcess(a=9, c=3), clock="linear")  # its speed limit is 4


def noise_of(any_subject) -> torch.Tensor:
    return torch.cat([x_1 for x_1, _ in any_subject.starts()])


def test_a_constant_step_error_on_a_linear_flow_reaches_the_bound():
    """The teacher x' = x shrinks by 7/8 per Euler step. The student makes two exact steps with an error of 0.1 each."""
    shrink = (1 - 1 / 8) ** 4
    teacher = subject(Field(lambda x, t: x), EULER)
    student = subject(Field(lambda x, t: x * (1 - shrink) / 0.5 - 0.2), Sampling(0.0, 2, "euler"), "student")
    first, middle, last = stability(teacher, student)
    assert (first.t, middle.t, last.t) == (1, 0.5, 0)
    assert (first.error, first.bound) == (0, 0)
    assert middle.error == pytest.approx(0.1, rel=1e-4)
    assert last.stretch == pytest.approx(shrink, rel=1e-4)
    assert last.step_error == pytest.approx(0.1, rel=1e-4)
    for value in (last.error, last.one_step, last.bound, last.certain):  # equality, because the flow is linear
        assert value == pytest.approx(0.1 * (1 + shrink), rel=1e-4)
    assert all(knot.holds for knot in (first, middle, last))


def test_the_triangle_inequality_holds_for_a_nonlinear_flow_and_a_multistep_solver():
    teacher = subject(Field(lambda x, t: torch.sin(3 * x + t)), Sampling(0.0, 24, "ab2"))
    for steps in (1, 3, 8):
        student = subject(Field(lambda x, t: torch.tanh(2 * x)), Sampling(0.0, steps, "euler"))
        knots = stability(teacher, student)
        assert len(knots) == steps + 1
        assert all(knot.error <= knot.certain + 1e-6 for knot in knots)
        assert knots[1].bound == pytest.approx(knots[1].error, rel=1e-4)  # both start from the same noise


def test_a_student_is_compared_at_the_times_of_its_own_grid():
    """A student whose steps follow the teacher's flow x' = x exactly has no error, whatever the teacher's own grid."""
    ends = dict(itertools.pairwise(knot_times(4, "quadratic").tolist()))

    def flow(x, t):
        h = ends[t.item()] - t.item()
        return x * (math.exp(h) - 1) / h

    teacher = subject(Field(lambda x, t: x), Sampling(0.0, 400, "heun"))
    knots = stability(teacher, subject(Field(flow), Sampling(0.0, 4, "euler", "quadratic")))
    assert [knot.t for knot in knots] == knot_times(4, "quadratic").tolist()
    assert max(knot.error for knot in knots) < 1e-4


def test_a_student_that_is_worse_away_from_the_teachers_states_exceeds_the_bound():
    teacher = subject(Field(lambda x, t: torch.zeros_like(x)), EULER)

    def worse(x, t):
        away = x - noise_of(teacher)[: len(x)] if t < 1 else torch.ones_like(x) * 0.01
        return 30 * away if t < 1 else away

    student = subject(Field(worse), Sampling(0.0, 4, "euler"), count=20)
    knots = stability(teacher, student)
    assert [knot.holds for knot in knots] == [True, True, False, False, False]
    assert all(knot.error <= knot.certain + 1e-6 for knot in knots)


def test_speeds_are_counted_per_coordinate_at_every_evaluation():
    """One coordinate has speed 3. The other has speed 5, which exceeds the limit of 4."""
    field = Field(lambda x, t: torch.stack([torch.full_like(x[:, 0], -3), torch.full_like(x[:, 0], 5)], 1))
    counted = speeds(subject(field, Sampling(0.0, 8, "heun")), LINEAR)
    assert counted.count == 50 * 2 * 16
    assert (counted.share_beyond, counted.share_beyond_now, counted.largest) == (0.5, 0.5, 5)
    # With the quadratic clock, the limit at time t is 1 + 6 t. Heun evaluates at 1, 7/8, 7/8, ..., 1/8, 1/8 and 0.
    counted = speeds(subject(field, Sampling(0.0, 8, "heun")), KacPath(KacProcess(a=9, c=3)))
    assert (counted.share_beyond, counted.share_beyond_now) == (0, (11 + 5) / 32)
    counted = speeds(subject(field, Sampling(0.0, 8, "heun")), LINEAR)
    edges, heights = counted.density()
    assert sum(heights) * (edges[1] - edges[0]) == pytest.approx(1)
    filled = [edge for edge, height in zip(edges, heights, strict=False) if height]
    assert filled == pytest.approx([3.0, 5.0], abs=0.1)
    assert len(heights) == BINS


def test_a_watched_network_is_guided_by_its_guide():
    network, seen = Field(lambda x, t: 3 * x, null_label=9), []
    network.guide = Field(lambda x, t: x)
    watched = Watched(network, lambda x, t, u: seen.append(u))
    x = torch.ones(2, 2)
    velocity = guide(watched, 1.0, torch.zeros(2, dtype=torch.long))(x, torch.tensor(0.5))
    assert torch.equal(velocity, 2 * 3 * x - x)
    assert [u.tolist() for u in seen] == [(3 * x).tolist()]


def test_infinite_velocities_are_refused():
    with pytest.raises(DivergedError):
        speeds(subject(Field(lambda x, t: x * math.nan), EULER), LINEAR)


def test_quality_is_measured_for_each_solver_and_number_of_steps():
    data = open_dataset(DataConfig(kind="moons"))
    pixels = open_space("pixels", data)
    train = {"pixels": Statistics.of(pixels.of_training_images(data)).moments}
    studied = subject(Field(lambda x, t: x), EULER, count=200)
    points = {(p.method, p.steps): p for p in quality_by_solver(studied, [pixels], train, steps=(5, 10))}
    assert {key: point.nfe for key, point in points.items()} == {
        **{("euler", n): n for n in (5, 10)},
        **{("heun", n): 2 * n for n in (5, 10)},
        **{(name, n): n for name in ("ab2", "ab2-euler") for n in (5, 10)},
    }
    expected = Statistics.of([noise_of(studied) * 0.8**5]).moments
    by_hand = frechet_distance(train["pixels"], expected)
    assert points["euler", 5].distances["pixels"] == pytest.approx(by_hand, rel=1e-4)


def test_energy_and_values_out_of_range_grow_with_guidance():
    """Every label has velocity 1, and the null label has 0. So all points move by 1 + w, with energy (1 + w)^2."""
    field = Field(lambda x, t: x, null_label=9)
    field.forward = lambda x, t, label: torch.where(label[:, None] == 9, 0.0, 1.0) * torch.ones_like(x)
    studied = subject(field, EULER)
    points = list(effect_of_guidance(studied, None, (0.0, 2.0)))
    assert [point.kinetic_energy for point in points] == pytest.approx([2, 18])
    ends = [noise_of(studied) - 1, noise_of(studied) - 3]
    assert [p.out_of_range for p in points] == pytest.approx([float((x.abs() > 1).double().mean()) for x in ends])
    assert [point.agreement for point in points] == [None, None]
    assert guide(field, 2.0, torch.zeros(3, dtype=torch.long)).nfe_per_call == 2


def test_label_agreement_uses_the_classifier():
    data = open_dataset(DataConfig(kind="moons"))
    classifier = open_space("classifier", data)
    still = subject(Field(lambda x, t: torch.zeros_like(x)), EULER)
    (point,) = effect_of_guidance(still, classifier, (0.0,))
    label = torch.cat([label for _, label in still.starts()])
    predicted = classifier.network.labels(classifier(noise_of(still)))
    assert point.agreement == pytest.approx(float((predicted == label).double().mean()))


def test_rank_correlations_are_computed_over_all_samples_and_within_classes():
    """The correlation is negative within each class and positive over all, because the classes differ in both."""
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


def test_noised_data_are_near_their_floor_and_shifted_data_are_not():
    data, path, generator = open_dataset(DataConfig(kind="moons")), KacPath(), torch.Generator().manual_seed(0)
    own = noised(path, data, 0.4, 2000, generator)
    right = marginal(own, 0.4, path, data, generator)
    wrong = marginal(own + 0.5, 0.4, path, data, generator)
    assert right.distance < 3 * right.floor
    assert wrong.distance == pytest.approx(0.5**2, rel=0.2)  # a shift of length 0.5 sqrt(2), averaged over directions
    rows = noised(path, data, 0.0, 50, generator)
    assert all((all_rows(data.train).images == row).all(1).any() for row in rows)


def test_trajectories_in_the_plane_have_their_speeds():
    studied = subject(Field(lambda x, t: torch.tensor([3.0, 4.0]).expand_as(x)), EULER)
    travelled = travel(studied)
    assert (travelled.x.shape, travelled.speed.shape) == ((9, 50, 2), (8, 50))
    assert travelled.t.tolist() == [1 - n / 8 for n in range(8)]
    assert torch.allclose(travelled.speed, torch.tensor(5.0))
    assert torch.allclose(travelled.x[-1], noise_of(studied) - torch.tensor([3.0, 4.0]), atol=1e-5)


def test_the_density_has_its_bottom_row_first():
    counts = density(torch.tensor([[-1.19, -1.19], [-1.19, -1.19], [1.2, 0.0], [9.0, 0.0]]))
    assert counts.shape == (CELLS, CELLS)
    assert counts.sum() == 3
    assert np.argwhere(counts == 2).tolist() == [[2, 2]]


def test_the_lipschitz_norm_of_a_linear_field_is_the_spectral_norm_of_its_matrix():
    matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.matrix_norm(matrix, 2).item()
    norms = spectral_norms(lambda x: (x.flatten(1) @ matrix.T).reshape(x.shape), torch.randn(5, 3, 2, 2))
    assert norms.tolist() == pytest.approx([expected] * 5, rel=1e-2)
    assert spectral_norms(lambda x: 0 * x + 1, torch.randn(2, 4)).tolist() == [0, 0]  # a constant field
    # Each sample has its own norm: the derivative of x^2 / 2 is x.
    x = torch.tensor([[1.0, -3.0], [0.5, 0.25]])
    assert spectral_norms(lambda x: x**2 / 2, x).tolist() == pytest.approx([3, 0.5])


@pytest.mark.parametrize(
    "network", [UNetConfig(channels=(8, 16), attention=(4,), groups=8), DiTConfig(depth=1, heads=1, head_channels=16)]
)
def test_the_lipschitz_norm_of_a_network_with_attention_is_that_of_its_jacobian(network: NetworkConfig):
    built = build_network(network, (1, 8, 8), 2)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, label = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    jacobian = torch.autograd.functional.jacobian(lambda x: built(x, torch.tensor(0.5), label), x)
    expected = torch.linalg.matrix_norm(jacobian.reshape(64, 64), 2).item()
    found = spectral_norms(lambda x: built(x, torch.tensor(0.5), label), x).item()
    assert 0.9 * expected < found < 1.001 * expected


def test_lipschitz_norms_are_measured_along_trajectories():
    """The field has the Jacobian t cos(x) on its diagonal, and moves all points by less than 0.01 in the first step."""
    field = Field(lambda x, t: t * torch.sin(x))
    studied = subject(field, Sampling(0.0, 100, "ab2"), batch_size=50)
    found = lipschitz(studied, field)
    at_noise = noise_of(studied).cos().abs().amax(1)
    assert found["lipschitz"] == found["lipschitz_t=1"] == pytest.approx(at_noise.max().item(), rel=1e-2)
    assert found["lipschitz_mean_t=1"] == pytest.approx(at_noise.mean().item(), rel=1e-2)
    # Points go towards 0, where the norm of the Jacobian is t.
    assert 0.9 * 0.5 < found["lipschitz_mean_t=0.5"] <= found["lipschitz_t=0.5"] <= 0.5
    assert len(found) == 2 + 2 * len(KNOTS)


def test_speeds_are_relative_to_the_limit_of_the_subjects_own_path():
    field = Field(lambda x, t: torch.tensor([1.0, -3.0]).expand_as(x))
    linear = PathConfig(a=9, c=3, clock="linear")
    images, within = follow(subject(field, EULER, config=config(path=linear)))  # the limit is 4
    assert images.shape == (50, 2)
    assert (within["percent_beyond"], within["largest_of_limit"]) == (0, 0.75)
    assert within["kinetic_energy"] == pytest.approx(10)
    slow = follow(subject(field, EULER, config=config(path=PathConfig(a=4, c=1, clock="linear"))))[1]  # the limit is 2
    assert (slow["percent_beyond"], slow["largest_of_limit"]) == (50, 1.5)
    free = follow(subject(field, EULER, config=config(path=PathConfig(kind="gaussian"))))[1]
    assert free == {"kinetic_energy": pytest.approx(10)}


def test_repeats_are_summarised_by_mean_and_range():
    assert Spread.of([1.0, 4.0, 1.0]) == (2, 1, 4, 3)
    assert str(Spread.of([1.0, 4.0, 1.0])) == "2 (1 to 4)"
    assert str(Spread.of([1.23456])) == str(Spread.of([1.23456, 1.23457])) == "1.23"


def test_the_compute_of_a_student_includes_its_initial_weights_and_the_store():
    stored = Trajectories(Sampling(0.0, 8, "heun"), False, 4, (), lambda names: {}, {0.0: 10, 2.0: 30})
    assert rollout_calls(stored, [0.0]) == 10 * 16
    assert rollout_calls(stored, [0.0, 2.0]) == 10 * 16 + 30 * 32  # guidance doubles the calls
    assert rollout_calls(stored._replace(is_forward=True), [0.0]) == 10 * 4  # a row is one of four intervals
    first, second = Training("first", 20, length=0.5), Training("second", 100, calls=2.5, length=0.25)
    for source in (stored, stored._replace(is_forward=True)):
        cost = student_cost(source, [0.0], [second, first])
        assert cost.training == 3 * 20 + 3 * 2.5 * 100
        assert cost.in_the_loop == {"first": 20 * 16 / 2, "second": 100 * 16 / 4}
    both = student_cost(stored, [0.0, 2.0], [first])
    assert both.in_the_loop == {"first": 20 * (10 * 16 + 30 * 32) / 40 / 2}


def test_a_store_pays_when_it_costs_at_most_as_much_as_teachers_in_the_loop():
    stored = Trajectories(Sampling(0.0, 10, "ab2"), False, 5, (), lambda names: {}, {0.0: 90})
    first, second = Training("first", 40, length=0.5), Training("second", 20, length=1)
    one, two = student_cost(stored, [0.0], [first]), student_cost(stored, [0.0], [second, first])
    # Students cost 200 calls each, because both trainings count once.
    assert students_to_pay(rollout_calls(stored, [0.0]), [one, two]) == 5
    assert students_to_pay(800, [one, two]) == 4
    assert students_to_pay(10, [two]) == 1
