"""Velocity networks: shapes, the null class, times for one and for all, the same network from the same config."""

import pytest
import torch

from kac.errors import CheckpointError
from kac.networks import MLPConfig, build_network, load_weights
from kac.networks.velocity import FourierFeatures, NetworkModule
from kac.options import OptionError


def awake(
    sample_shape: tuple[int, ...], num_classes: int = 5, width: int = 32, depth: int = 2, conditions: tuple = ()
) -> NetworkModule:
    """A network whose last layer, which starts at zero, has been given weights."""
    torch.manual_seed(0)
    network = build_network(MLPConfig(width=width, depth=depth, conditions=conditions), sample_shape, num_classes)
    torch.nn.init.normal_(network.leave[1].weight)
    torch.nn.init.normal_(network.leave[1].bias)
    return network


@pytest.mark.parametrize("sample_shape", [(2,), (1, 8, 8), (3, 4, 5), (1,)])
@pytest.mark.parametrize("width", [1, 2, 7, 32])
def test_velocity_has_the_shape_of_the_sample(sample_shape, width):
    network = awake(sample_shape, width=width, depth=1)
    for batch in (1, 6):
        u = network(torch.randn(batch, *sample_shape), torch.rand(batch), torch.randint(0, 6, (batch,)))
        assert u.shape == (batch, *sample_shape)
        assert bool(u.isfinite().all())


def test_a_fresh_network_is_the_zero_field():
    network = build_network(MLPConfig(width=16, depth=2), (1, 8, 8), 10)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(network(x, torch.rand(4), torch.arange(4)), torch.zeros_like(x))


def test_null_label_is_a_class_of_its_own():
    network = awake((2,), num_classes=5)
    assert network.null_label == 5
    x = torch.randn(1, 2).expand(6, 2)
    fields = network(x, torch.tensor(0.4), torch.arange(6))
    assert len(torch.unique(fields, dim=0)) == 6
    with pytest.raises(IndexError):
        network(x[:1], torch.tensor(0.4), torch.tensor([6]))


@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3, dtype=torch.float64)])
def test_one_time_serves_the_whole_batch(t):
    network, x, label = awake((1, 8, 8)), torch.randn(7, 1, 8, 8), torch.randint(0, 5, (7,))
    torch.testing.assert_close(network(x, t, label), network(x, torch.full((7,), 0.3), label))


def test_each_sample_has_its_own_time_and_class():
    network, x = awake((2,)), torch.randn(5, 2)
    t, label = torch.linspace(0, 1, 5), torch.arange(5)
    together = network(x, t, label)
    for i in range(5):
        alone = network(x[i : i + 1], t[i : i + 1], label[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1])
    assert not torch.allclose(network(x, 1 - t, label)[0], together[0])
    assert not torch.allclose(network(x, t, label.flip(0))[0], together[0])


def test_times_are_told_apart():
    """Every pair of 101 times is further apart in features than rounding by far, and none repeats."""
    features = FourierFeatures(64)(torch.linspace(0, 1, 101))
    assert features.shape == (101, 64)
    distances = torch.cdist(features, features) + torch.eye(101) * 100
    assert distances.min().item() > 0.5


def test_same_seed_and_config_build_the_same_network():
    config = MLPConfig(width=24, depth=2)
    torch.manual_seed(3)
    first = build_network(config, (1, 8, 8), 10).state_dict()
    torch.manual_seed(3)
    second = build_network(config, (1, 8, 8), 10).state_dict()
    other = build_network(config, (1, 8, 8), 10).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_config_decides_the_size():
    def parameters(**config: int) -> int:
        return sum(p.numel() for p in build_network(MLPConfig(**config), (2,), 3).parameters())

    assert parameters(width=8, depth=1) < parameters(width=8, depth=2) < parameters(width=16, depth=2)
    assert len(build_network(MLPConfig(depth=4, width=4), (2,), 3).blocks) == 4
    assert len(build_network(MLPConfig(depth=4, width=4), (2,), 3).label.weight) == 3 + 1


def test_every_parameter_learns():
    network = awake((2,))
    network(torch.randn(60, 2), torch.rand(60), torch.arange(6).repeat(10)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]).any(1).all()), name


@pytest.mark.parametrize("bad", [{"width": 0}, {"depth": -1}, {"kind": "resnet"}, {"heads": 4}])
def test_config_refuses_what_cannot_be_built(bad):
    with pytest.raises(OptionError, match=f"--{next(iter(bad))}: "):
        MLPConfig(**bad)


# Conditions


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(count, 2), torch.rand(count), torch.arange(count) % 6


def test_a_student_with_more_conditions_starts_as_its_teacher():
    """New conditions have no effect before training, and all weights of the teacher are taken over."""
    teacher = awake((2,))
    student = build_network(MLPConfig(width=32, depth=2, conditions=("end_time", "guidance")), (2,), 5)
    load_weights(student, teacher.state_dict())
    x, t, label = batch()
    for end_time in (0.0, 0.7):
        u = student(x, t, label, end_time=torch.tensor(end_time), guidance=torch.full((6,), 3.0))
        assert torch.equal(u, teacher(x, t, label))


def test_conditions_are_learned_and_told_apart():
    network = awake((2,), conditions=("end_time", "guidance"))
    x, t, label = batch()
    given = {"end_time": torch.rand(6), "guidance": torch.rand(6) * 10}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(x, t, label, **given).square().sum().backward()
    optimizer.step()
    fields = [network(x, t, label, **{**given, name: given[name] + 0.5}) for name in given]
    fields.append(network(x, t, label, **given))
    assert len(torch.unique(torch.stack(fields).flatten(1), dim=0)) == 3


@pytest.mark.parametrize("given", [{}, {"guidance": 1.0}, {"end_time": 0.0, "guidance": 1.0}])
def test_other_conditions_than_the_configs_are_refused(given):
    network = awake((2,), conditions=("end_time",))
    with pytest.raises(ValueError, match=r"expected the conditions \['end_time'\] of the config, got"):
        network(*batch(), **{name: torch.tensor(value) for name, value in given.items()})


@pytest.mark.parametrize("change", ["fewer", "more", "shape"])
def test_weights_that_do_not_fit_are_not_taken_over(change):
    weights = awake((2,), conditions=("end_time",)).state_dict()
    if change == "fewer":
        del weights["enter.weight"]
    if change == "shape":
        weights["enter.weight"] = torch.zeros(3, 3)
    network = awake((2,), conditions=() if change == "more" else ("end_time",))
    with pytest.raises(CheckpointError, match="expected the weights of this network, found"):
        load_weights(network, weights)
