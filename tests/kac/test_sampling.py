"""Sampling of teachers and students, and the initial noise."""

import pytest
import torch

from kac import noise as noises
from kac.losses import Interval
from kac.losses.objectives import endpoint_loss
from kac.model import Model, ModelConfig
from kac.networks import MLPConfig, OutsideConfig, build_network
from kac.path import KacPath, PathConfig
from kac.precision import Precision
from kac.sampling import Sampling, draw, generate, initial_noise, student_sampling, teacher_sampling
from kac.util.errors import ArgumentError, DistillKacError


def config(**changes) -> ModelConfig:
    values = {
        "kind": "student",
        "network": MLPConfig(width=8, depth=1),
        "path": PathConfig(),
        "data": "digits",
        "data_sha256": "of the data",
        "sample_shape": (1, 3, 3),
        "num_classes": 4,
        "class_frequencies": (0.25, 0.25, 0.25, 0.25),
        "steps": 4,
        "guidance": 1.5,
    }
    return ModelConfig(**{**values, **changes})


def sample(network, x_1: torch.Tensor, label: torch.Tensor, steps: int):
    """Return the solution of a student with ``steps`` steps."""
    return generate(network, x_1, label, student_sampling(config(steps=steps)))


def test_teachers_take_any_sampling_and_students_their_own_euler_steps():
    teacher = config(kind="teacher", steps=None, guidance=None)
    assert teacher_sampling(teacher) == Sampling(0.0, 100, "ab2", "uniform")
    assert teacher_sampling(teacher, 2.0, 10, "heun") == Sampling(2.0, 10, "heun", "uniform")
    assert teacher_sampling(teacher, 0.0, 20, "ab2", "quadratic") == Sampling(0.0, 20, "ab2", "quadratic")
    assert teacher_sampling(teacher, time_factor=0.9) == Sampling(0.0, 100, "ab2", "uniform", 0.9)
    assert student_sampling(config(steps=7, guidance=3.0)) == Sampling(0.0, 7, "euler", "uniform")
    conditioned = config(guidance=3.0, network=MLPConfig(conditions=("guidance",)))
    assert student_sampling(conditioned) == Sampling(3.0, 4, "euler", "uniform")


def test_a_student_of_several_scales_accepts_scales_in_its_range():
    student = config(guidance=0.0, guidance_scales=(0.0, 0.5, 2.0), network=MLPConfig(conditions=("guidance",)))
    assert student_sampling(student, guidance=1.2) == Sampling(1.2, 4, "euler", "uniform")
    with pytest.raises(ArgumentError, match=r"`guidance` is 3\.0.*0\.0 to 2\.0"):
        student_sampling(student, guidance=3.0)


def test_a_student_refuses_steps_and_guidance_it_was_not_trained_for():
    with pytest.raises(ArgumentError, match=r"`guidance` is 1\.0.*1\.5"):
        student_sampling(config(), guidance=1.0)
    with pytest.raises(ArgumentError, match=r"`steps` is 5.*only with 4"):
        student_sampling(config(), steps=5)


def test_noise_and_labels_depend_on_the_sample_ids():
    x_1, label = initial_noise(config(), 5, range(10, 14))
    assert torch.equal(x_1, noises.noise(KacPath(), 5, range(10, 14), (1, 3, 3)))
    assert torch.equal(label, noises.labels(5, range(10, 14), [0.25] * 4))
    assert initial_noise(config(), 5, range(1, 6), (3, 0))[1].tolist() == [0, 3, 0, 3, 0]
    for labels in ((4,), ()):
        with pytest.raises(DistillKacError, match=r"`labels`.*0 \.\. 3"):
            initial_noise(config(), 5, range(3), labels)


def test_classes_without_training_images_are_refused():
    gaps = config(class_frequencies=(0.5, 0.0, 0.5, 0.0))
    assert initial_noise(gaps, 5, range(3), (2, 0))[1].tolist() == [2, 0, 2]
    with pytest.raises(DistillKacError, match=r"`labels`.*\[1, 3\].*0, 2"):
        initial_noise(gaps, 5, range(3), (3, 1, 2))


def test_an_unconditional_model_receives_only_the_null_label():
    unconditional = config(conditioning="none")
    x_1, label = initial_noise(unconditional, 5, range(10, 14))
    assert torch.equal(x_1, initial_noise(config(), 5, range(10, 14))[0])
    assert label.tolist() == [4, 4, 4, 4]
    with pytest.raises(ArgumentError, match=r"`labels`.*unconditional"):
        initial_noise(unconditional, 5, range(3), (0,))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conditioning": "none"}, "unconditional"),
        ({"conditioning": "classes"}, "never seen the null label"),
        ({"num_classes": 1, "class_frequencies": (1.0,)}, "only one class"),
        ({"class_frequencies": (0.0, 0.0, 1.0, 0.0)}, "one class"),
        ({"network": OutsideConfig(module="a:b", labels="without_null")}, "no null label"),
    ],
)
def test_refuses_to_guide_a_teacher_that_cannot_be_guided(changes, reason):
    teacher = config(kind="teacher", steps=None, guidance=None, **changes)
    assert teacher_sampling(teacher, 0.0) == Sampling(0.0, 100, "ab2")
    with pytest.raises(ArgumentError, match=rf"`guidance` 1\.5.*{reason}"):
        teacher_sampling(teacher, 1.5)


@pytest.mark.parametrize("steps", [1, 2, 4, 20])
def test_student_sampling_takes_euler_steps(steps):
    torch.manual_seed(0)
    network = build_network(MLPConfig(width=16, depth=1), (1, 3, 3), 4)
    torch.nn.init.normal_(network.leave[1].weight)
    noise, label = torch.randn(6, 1, 3, 3), torch.tensor([0, 1, 2, 3, 4, 0])
    solution = sample(network, noise, label, steps)
    x = noise
    with torch.no_grad():
        for k in range(steps):
            x = x - network(x, torch.tensor(1 - k / steps), label) / steps
    torch.testing.assert_close(solution.x, x)
    assert solution.nfe == steps
    assert solution.knots == []


def test_generate_calls_the_student_once_per_step_without_gradients():
    calls = []

    class Model:
        null_label = 4

        def __call__(self, x, t, label):
            calls.append((t.item(), label.tolist(), x.shape, torch.is_grad_enabled()))
            return x

    noise = torch.randn(3, 2, requires_grad=True)
    assert not sample(Model(), noise, torch.tensor([2, 0, 1]), 4).x.requires_grad
    assert calls == [(t, [2, 0, 1], (3, 2), False) for t in (1.0, 0.75, 0.5, 0.25)]


def test_a_student_with_zero_loss_ends_where_the_teacher_ends():
    """The loss and the sampler use the same sign and scale of velocities."""
    generator = torch.Generator().manual_seed(2)
    knots = torch.randn(5, 3, 2, generator=generator, dtype=torch.float64)  # the teacher's, starting at t = 1

    class Student:
        null_label = 0

        def __call__(self, x, t, label):
            k = round(4 * (1 - float(t.flatten()[0])))
            return (knots[k] - knots[k + 1]) * 4

    for k in range(4):
        t_start, t_end = torch.full((3,), 1 - k / 4), torch.full((3,), 1 - (k + 1) / 4)
        loss = endpoint_loss(
            Student(), Interval(knots[k], knots[k + 1], t_start.double(), t_end.double(), *torch.zeros(2, 3))
        )
        assert loss.item() < 1e-24
    torch.testing.assert_close(sample(Student(), knots[0], torch.zeros(3), 4).x, knots[4])


@pytest.mark.parametrize("steps", [0, -3])
def test_refuses_to_sample_without_steps(steps):
    with pytest.raises(ValueError, match=f"`knots` is {steps}"):
        sample(lambda x, t, label: x, torch.zeros(1, 2), torch.zeros(1), steps)


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 4, "steps": 0}, {"count": 4, "steps": -3}])
@pytest.mark.parametrize("changes", [{}, {"kind": "teacher", "steps": None, "guidance": None}])
def test_a_model_refuses_numbers_below_one(options, changes):
    model_config = config(**changes)
    model = Model(model_config, build_network(model_config.network, (1, 3, 3), 4))
    with pytest.raises(ArgumentError, match=f"`{[*options][-1]}` is {[*options.values()][-1]}"):
        model.sample(**options)


def test_a_network_receives_the_end_time_and_guidance_that_it_takes():
    seen = []

    class Student:
        null_label, takes = 4, ("end_time", "guidance")

        def __call__(self, x, t, label, end_time, guidance):
            seen.append((t.item(), end_time.item(), guidance.item()))
            return torch.zeros_like(x)

    noise, label = torch.randn(3, 2), torch.zeros(3, dtype=torch.int64)
    solution = generate(Student(), noise, label, Sampling(2.5, 4, "euler"))
    assert seen == [(1.0, 0.75, 2.5), (0.75, 0.5, 2.5), (0.5, 0.25, 2.5), (0.25, 0.0, 2.5)]
    assert solution.nfe == 4  # guidance is an input, so there is no second evaluation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 3, 7, 49, 100])
def test_each_step_starts_at_the_end_of_the_step_before_it(steps, dtype):
    seen = []

    class Student:
        null_label, takes = 4, ("end_time",)

        def __call__(self, x, t, label, end_time):
            seen.append((t, end_time))
            return torch.zeros_like(x)

    generate(Student(), torch.randn(3, 2, dtype=dtype), torch.zeros(3), Sampling(0.0, steps, "euler"))
    times = (torch.arange(steps, -1, -1, dtype=torch.float64) / steps).to(dtype)
    for (t, end_time), start, end in zip(seen, times[:-1], times[1:], strict=True):
        assert t.dtype == end_time.dtype == dtype
        assert torch.equal(t, start)
        assert torch.equal(end_time, end)


def test_draw_passes_conditions_to_the_network_in_any_precision():
    network = build_network(MLPConfig(width=8, depth=1, conditions=("end_time",)), (1, 3, 3), 4)
    torch.nn.init.normal_(network.leave[1].weight)
    torch.nn.init.normal_(network.conditions.end_time[3].weight)
    model = Model(network, config())
    float32 = draw(model, Sampling(0.0, 3, "euler"), Precision(), seed=0, count=5, batch_size=2)
    assert float32.images.shape == (5, 1, 3, 3)
    bfloat16 = draw(model, Sampling(0.0, 3, "euler"), Precision(dtype="bfloat16"), seed=0, count=5, batch_size=5)
    torch.testing.assert_close(float32.images, bfloat16.images, rtol=0.1, atol=0.5)
