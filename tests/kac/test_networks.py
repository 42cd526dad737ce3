"""Velocity networks: shapes, null label, times, conditions and seeds, first of the MLP, then of diffusers' networks."""

import pytest
import torch
from torch import Tensor, nn

from jobs.parsing import parse
from kac.networks import DiTConfig, MLPConfig, NetworkConfig, UNetConfig, build_network, load_weights
from kac.networks.velocity import FourierFeatures, NetworkModule
from kac.path import GaussianPath, KacPath
from kac.process import KacProcess
from kac.util.errors import ArgumentError, CheckpointError, as_options
from pipeline.config import TeachSpec


def nonzero_mlp(
    sample_shape: tuple[int, ...], num_classes: int = 5, width: int = 32, depth: int = 2, conditions: tuple = ()
) -> NetworkModule:
    """Return an MLP whose last layer, initially zero, has random weights."""
    torch.manual_seed(0)
    network = build_network(MLPConfig(width=width, depth=depth, conditions=conditions), sample_shape, num_classes)
    torch.nn.init.normal_(network.leave[1].weight)
    torch.nn.init.normal_(network.leave[1].bias)
    return network


@pytest.mark.parametrize("sample_shape", [(2,), (1, 8, 8), (3, 4, 5), (1,)])
@pytest.mark.parametrize("width", [1, 2, 7, 32])
def test_a_velocity_has_the_shape_of_the_sample(sample_shape, width):
    network = nonzero_mlp(sample_shape, width=width, depth=1)
    for batch in (1, 6):
        u = network(torch.randn(batch, *sample_shape), torch.rand(batch), torch.randint(0, 6, (batch,)))
        assert u.shape == (batch, *sample_shape)
        assert bool(u.isfinite().all())


def test_a_new_network_is_the_zero_field():
    network = build_network(MLPConfig(width=16, depth=2), (1, 8, 8), 10)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(network(x, torch.rand(4), torch.arange(4)), torch.zeros_like(x))


def test_the_null_label_is_its_own_class():
    network = nonzero_mlp((2,), num_classes=5)
    assert network.null_label == 5
    x = torch.randn(1, 2).expand(6, 2)
    fields = network(x, torch.tensor(0.4), torch.arange(6))
    assert len(torch.unique(fields, dim=0)) == 6
    with pytest.raises(IndexError):
        network(x[:1], torch.tensor(0.4), torch.tensor([6]))


@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3, dtype=torch.float64)])
def test_a_scalar_time_applies_to_the_whole_batch(t):
    network, x, label = nonzero_mlp((1, 8, 8)), torch.randn(7, 1, 8, 8), torch.randint(0, 5, (7,))
    torch.testing.assert_close(network(x, t, label), network(x, torch.full((7,), 0.3), label))


def test_each_sample_has_its_own_time_and_class():
    network, x = nonzero_mlp((2,)), torch.randn(5, 2)
    t, label = torch.linspace(0, 1, 5), torch.arange(5)
    together = network(x, t, label)
    for i in range(5):
        single = network(x[i : i + 1], t[i : i + 1], label[i : i + 1])
        torch.testing.assert_close(single, together[i : i + 1])
    assert not torch.allclose(network(x, 1 - t, label)[0], together[0])
    assert not torch.allclose(network(x, t, label.flip(0))[0], together[0])


def test_fourier_features_distinguish_times():
    """The features of any two of 101 times differ by far more than rounding errors."""
    features = FourierFeatures(64)(torch.linspace(0, 1, 101))
    assert features.shape == (101, 64)
    distances = torch.cdist(features, features) + torch.eye(101) * 100
    assert distances.min().item() > 0.5


def test_the_same_seed_and_config_build_the_same_network():
    config = MLPConfig(width=24, depth=2)
    torch.manual_seed(3)
    first = build_network(config, (1, 8, 8), 10).state_dict()
    torch.manual_seed(3)
    second = build_network(config, (1, 8, 8), 10).state_dict()
    other = build_network(config, (1, 8, 8), 10).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_config_determines_the_size():
    def parameters(**config: int) -> int:
        return sum(p.numel() for p in build_network(MLPConfig(**config), (2,), 3).parameters())

    assert parameters(width=8, depth=1) < parameters(width=8, depth=2) < parameters(width=16, depth=2)
    assert len(build_network(MLPConfig(depth=4, width=4), (2,), 3).blocks) == 4
    assert len(build_network(MLPConfig(depth=4, width=4), (2,), 3).label.weight) == 3 + 1


def test_every_parameter_gets_a_gradient():
    network = nonzero_mlp((2,))
    network(torch.randn(60, 2), torch.rand(60), torch.arange(6).repeat(10)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]).any(1).all()), name


@pytest.mark.parametrize("kind", [MLPConfig(width=8, depth=1), UNetConfig(channels=(8,), blocks=1, groups=4)])
@pytest.mark.parametrize("clock", ["linear", "quadratic"])
def test_a_bounded_network_obeys_the_speed_limit_except_in_training(kind, clock):
    path = KacPath(KacProcess(9, 3), clock=clock)
    network = build_network(kind.model_copy(update={"bounded": True}), (1, 8, 8), 3, path)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    inputs = 20 * torch.randn(6, 1, 8, 8), torch.linspace(0, 1, 6), torch.arange(6) % 4
    limit = path.speed_limit_at(inputs[1])[:, None, None, None]
    free, u = network.train()(*inputs), network.eval()(*inputs)
    assert bool((free.abs() > path.speed_limit()).any())
    assert bool((u.abs() <= limit).all())
    torch.testing.assert_close(u, torch.clamp(free, -limit, limit))
    assert network(inputs[0], torch.tensor(0.0), inputs[2]).abs().max() <= path.speed_limit_at(torch.tensor(0.0))


@pytest.mark.parametrize("path", [None, GaussianPath()])
def test_a_bounded_network_needs_a_path_with_a_speed_limit(path):
    with pytest.raises(ArgumentError, match=r"`network\.bounded`"):
        build_network(MLPConfig(bounded=True), (2,), 3, path)
    with pytest.raises(ArgumentError, match=r"`network\.bounded`"):
        TeachSpec(out="o", network={"kind": "mlp", "bounded": True}, path="gaussian")


@pytest.mark.parametrize("bad", [{"width": 0}, {"depth": -1}, {"kind": "resnet"}, {"heads": 4}])
def test_a_bad_config_is_refused(bad):
    with pytest.raises(ArgumentError) as error:
        MLPConfig(**bad)
    assert error.value.name == next(iter(bad))


# Conditions of the MLP


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(count, 2), torch.rand(count), torch.arange(count) % 6


def test_a_student_with_more_conditions_starts_as_its_teacher():
    """New conditions have no effect before training, and all weights of the teacher are loaded."""
    teacher = nonzero_mlp((2,))
    student = build_network(MLPConfig(width=32, depth=2, conditions=("end_time", "guidance")), (2,), 5)
    load_weights(student, teacher.state_dict())
    x, t, label = batch()
    for end_time in (0.0, 0.7):
        u = student(x, t, label, end_time=torch.tensor(end_time), guidance=torch.full((6,), 3.0))
        assert torch.equal(u, teacher(x, t, label))


def test_conditions_are_learned_independently():
    network = nonzero_mlp((2,), conditions=("end_time", "guidance"))
    x, t, label = batch()
    given = {"end_time": torch.rand(6), "guidance": torch.rand(6) * 10}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(x, t, label, **given).square().sum().backward()
    optimizer.step()
    fields = [network(x, t, label, **{**given, name: given[name] + 0.5}) for name in given]
    fields.append(network(x, t, label, **given))
    assert len(torch.unique(torch.stack(fields).flatten(1), dim=0)) == 3


@pytest.mark.parametrize("given", [{}, {"guidance": 1.0}, {"end_time": 0.0, "guidance": 1.0}])
def test_undeclared_or_missing_conditions_are_refused(given):
    network = nonzero_mlp((2,), conditions=("end_time",))
    with pytest.raises(ValueError, match=r"conditions \['end_time'\]"):
        network(*batch(), **{name: torch.tensor(value) for name, value in given.items()})


@pytest.mark.parametrize("change", ["fewer", "more", "shape"])
def test_weights_that_do_not_fit_are_refused(change):
    weights = nonzero_mlp((2,), conditions=("end_time",)).state_dict()
    if change == "fewer":
        del weights["enter.weight"]
    if change == "shape":
        weights["enter.weight"] = torch.zeros(3, 3)
    network = nonzero_mlp((2,), conditions=() if change == "more" else ("end_time",))
    with pytest.raises(CheckpointError, match="conditions" if change == "more" else "enter.weight"):
        load_weights(network, weights)


# The networks of diffusers

SHAPE, CLASSES = (3, 16, 16), 5
UNET = UNetConfig(channels=(16, 32), blocks=1, groups=8, attention=(8,), head_channels=8)
DIT = DiTConfig(heads=2, head_channels=16, depth=2, patch=4)
CONDITIONS = ("end_time", "guidance")

both = pytest.mark.parametrize("config", [UNET, DIT], ids=lambda config: config.kind)


def with_options(config: NetworkConfig, **options: object) -> NetworkConfig:
    return type(config)(**{**config.model_dump(), **options})


def trained(config: NetworkConfig, sample_shape: tuple[int, ...] = SHAPE) -> NetworkModule:
    """Return a network whose weights, except those of its conditions, are changed as if by training."""
    torch.manual_seed(0)
    network = build_network(config, sample_shape, CLASSES)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if not name.startswith("conditions."):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network.eval()


def images(count: int = 6, sample_shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, times and labels, including the null label."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(count, *sample_shape, generator=generator), torch.rand(count, generator=generator)
    return x, t, torch.arange(count) % (CLASSES + 1)


def class_embeddings(network: NetworkModule) -> list[nn.Parameter]:
    """Return the class embeddings: one in a U-Net, one per block in a DiT."""
    return [p for name, p in network.named_parameters() if name.endswith(("class_embedding.weight", "_table.weight"))]


@pytest.mark.parametrize(
    ("config", "sample_shape"),
    [
        (UNET, (3, 16, 16)),
        (UNET, (1, 8, 8)),
        (UNetConfig(channels=(8,), blocks=1, groups=4), (3, 7, 7)),
        (UNetConfig(channels=(8, 16, 24), blocks=2, groups=8, scale_shift=True, patch=2), (1, 8, 8)),
        (DIT, (3, 16, 16)),
        (DIT, (1, 8, 8)),
        (DiTConfig(heads=1, head_channels=8, depth=1, patch=1), (4, 3, 3)),
        (DiTConfig(heads=1, head_channels=8, depth=1, patch=8), (1, 8, 8)),
    ],
)
def test_velocities_of_images_have_their_shape(config, sample_shape):
    network = trained(config, sample_shape)
    for count in (1, 6):
        x, t, label = images(count, sample_shape)
        velocity = network(x, t, label)
        assert velocity.shape == x.shape
        assert velocity.dtype == torch.float32
        assert bool(velocity.isfinite().all())
        assert velocity.abs().max() > 0.01


@both
def test_a_new_network_of_diffusers_is_the_zero_field(config):
    x, t, label = images()
    network = build_network(config, SHAPE, CLASSES)
    assert torch.equal(network(x, t, label), torch.zeros_like(x))
    network(x, t, label).square().sum().backward()
    assert all(
        parameter.grad is not None for parameter in network.parameters()
    )  # data-parallel training needs a gradient for every parameter


@both
def test_the_null_label_is_the_class_after_the_last(config):
    network, (x, t, _) = trained(config), images()
    assert network.null_label == CLASSES
    fields = network(x[:1].expand(6, -1, -1, -1), t[:1], torch.arange(6))
    assert len(torch.unique(fields, dim=0)) == 6
    with pytest.raises(IndexError):
        network(x[:1], t[:1], torch.tensor([CLASSES + 1]))


@both
@pytest.mark.parametrize("label", [0, CLASSES])
def test_a_label_changes_only_its_own_embedding(config, label):
    network, (x, t, _) = trained(config), images()
    network(x, t, torch.full((6,), label)).square().sum().backward()
    tables = class_embeddings(network)
    assert len(tables) == (1 if config.kind == "unet" else config.depth)
    for table in tables:
        assert table.shape[0] == CLASSES + 1
        assert table.grad.any(1).nonzero().flatten().tolist() == [label]


@both
@pytest.mark.parametrize("t", [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3, dtype=torch.float64)])
def test_a_scalar_time_applies_to_all_images(config, t):
    network, (x, _, label) = trained(config), images()
    torch.testing.assert_close(network(x, t, label), network(x, torch.full((6,), 0.3), label))


@both
def test_each_image_has_its_own_time_and_class(config):
    network, (x, t, label) = trained(config), images()
    together = network(x, t, label)
    for i in range(6):
        single = network(x[i : i + 1], t[i : i + 1], label[i : i + 1])
        torch.testing.assert_close(single, together[i : i + 1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(x, 1 - t, label)[0], together[0])
    assert not torch.allclose(network(x, t, label.flip(0))[0], together[0])


@both
@pytest.mark.parametrize("time_scale", [1.0, 250.0, 1000.0])
def test_diffusers_receives_scaled_times(config, time_scale):
    network, (x, t, label) = trained(with_options(config, time_scale=time_scale)), images()
    inside = network.get_submodule(network.diffusers_name)
    velocity = network(x, t, label)
    assert torch.equal(velocity, inside(x, time_scale * t, class_labels=label).sample)
    assert not torch.allclose(velocity, inside(x, 2 * time_scale * t, class_labels=label).sample)


@both
def test_times_are_not_rounded(config):
    """Scaled times are not integers, although diffusers is mostly used with integers."""
    network, (x, _, label) = trained(config), images()
    near, far = (network(x, torch.tensor(t), label) for t in (0.5001, 0.5009))
    assert not torch.allclose(near, far, rtol=1e-4)


@both
def test_a_network_without_dropout_is_deterministic(config):
    """By default, diffusers' DiT drops labels in training. Here it must not, because the teacher's loss drops them."""
    network, (x, t, label) = trained(config), images()
    exact = network(x, t, label)
    torch.testing.assert_close(network.train()(x, t, label), exact, rtol=1e-4, atol=1e-5)
    network = trained(with_options(config, dropout=0.5))
    assert torch.equal(network(x, t, label), exact)
    assert not torch.allclose(network.train()(x, t, label), exact, rtol=0.01, atol=0.01)


@both
def test_every_parameter_gets_a_gradient_with_conditions(config):
    network, (x, t, label) = trained(with_options(config, conditions=CONDITIONS)), images()
    for name, parameter in network.named_parameters():
        if name.startswith("conditions."):
            nn.init.normal_(parameter)
    network(x, t, label, end_time=t / 2, guidance=3 * t).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@both
def test_new_conditions_have_no_effect_and_are_learned(config):
    teacher, (x, t, label) = trained(config), images()
    student = build_network(with_options(config, conditions=CONDITIONS), SHAPE, CLASSES).eval()
    load_weights(student, teacher.state_dict())
    given = {"end_time": t / 2, "guidance": torch.tensor(3.0)}
    assert torch.equal(student(x, t, label, **given), teacher(x, t, label))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(x, t, label, **given).square().mean().backward()
    optimizer.step()
    field = student(x, t, label, **given)
    for name in CONDITIONS:
        other = student(x, t, label, **{**given, name: given[name] + 0.5})
        assert not torch.allclose(other, field, rtol=1e-4), name


@both
def test_a_scalar_condition_applies_to_all_images(config):
    network, (x, t, label) = trained(with_options(config, conditions=("end_time",))), images()
    for parameter in network.get_submodule("conditions").parameters():
        nn.init.normal_(parameter, std=0.3)
    together = network(x, t, label, end_time=torch.tensor(0.25))
    torch.testing.assert_close(together, network(x, t, label, end_time=torch.full((6,), 0.25)))


@both
@pytest.mark.parametrize("given", [{}, {"guidance": 1.0}, {"end_time": 0.0, "guidance": 1.0}])
def test_networks_of_diffusers_refuse_undeclared_or_missing_conditions(config, given):
    network = trained(with_options(config, conditions=("end_time",)))
    with pytest.raises(ValueError, match=r"conditions \['end_time'\]"):
        network(*images(), **{name: torch.tensor(value) for name, value in given.items()})


@pytest.mark.parametrize("config", [UNET, with_options(UNET, patch=2, conditions=CONDITIONS, attention=()), DIT])
def test_a_network_on_the_meta_device_has_the_same_weights(config):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_network(config, SHAPE, CLASSES).state_dict().items()}
    built = build_network(config, SHAPE, CLASSES).state_dict()
    assert shapes == {name: value.shape for name, value in built.items()}
    assert all(value.device.type == "cpu" for value in built.values())


@both
def test_the_seed_determines_the_initial_weights(config):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(build_network(config, SHAPE, CLASSES).state_dict())
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_patches_are_channels_of_a_smaller_image():
    whole, (x, t, label) = trained(with_options(UNET, patch=2, attention=(4,))), images()
    inside = build_network(with_options(UNET, attention=(4,)), (12, 8, 8), CLASSES).eval()
    inside.load_state_dict(whole.state_dict())
    folded = inside(nn.functional.pixel_unshuffle(x, 2), t, label)
    assert torch.equal(whole(x, t, label), nn.functional.pixel_shuffle(folded, 2))


def test_attention_is_at_the_requested_levels():
    """Levels are given by their width in pixels, after patches are folded into channels."""

    def blocks_with_attention(attention: tuple[int, ...], patch: int = 1) -> tuple[list[bool], list[bool]]:
        config = with_options(UNET, channels=(8, 16, 16), attention=attention, patch=patch)
        unet = build_network(config, SHAPE, CLASSES).get_submodule("unet")
        return tuple([hasattr(block, "attentions") for block in part] for part in (unet.down_blocks, unet.up_blocks))

    assert blocks_with_attention(()) == ([False, False, False], [False, False, False])
    assert blocks_with_attention((16,)) == ([True, False, False], [False, False, True])
    assert blocks_with_attention((8, 4)) == ([False, True, True], [True, True, False])
    assert blocks_with_attention((8,), patch=2) == ([True, False, False], [False, False, True])


# Errors of the networks of diffusers


@pytest.mark.parametrize(
    ("words", "sample_shape", "option", "values"),
    [
        ("--network unet", (3, 16, 8), "network", ["[3, 16, 8]"]),
        ("--network unet", (2,), "network", ["[2]"]),
        ("--network dit", (3, 16, 8), "network", ["[3, 16, 8]"]),
        ("--network dit", (64,), "network", ["[64]"]),
        ("--network unet --network.patch 3", SHAPE, "network.patch", ["16"]),
        ("--network dit --network.patch 32", SHAPE, "network.patch", ["16"]),
        ("--network unet --network.channels 32 32 32 32 --network.patch 4", SHAPE, "network.channels", ["at most 3"]),
        ("--network unet --network.channels 32 32", (1, 7, 7), "network.channels", ["at most 1"]),
        ("--network unet --network.attention 8 5", SHAPE, "network.attention", ["[5]", "[16, 8]"]),
        ("--network unet --network.attention 16 --network.patch 2", SHAPE, "network.attention", ["[16]", "[8, 4]"]),
        (
            "--network unet --network.channels 32 64 --network.head-channels 48",
            SHAPE,
            "network.head_channels",
            ["[64]"],
        ),
        (
            "--network unet --network.channels 32 64 --network.attention 16 --network.head-channels 64",
            SHAPE,
            "network.head_channels",
            ["[32, 64]"],
        ),
        ("--network unet --network.channels 32 48", SHAPE, "network.groups", ["32", "[32, 48]"]),
        ("--network unet --network.channels 32 0", SHAPE, "network.channels", ["0"]),
        ("--network unet --network.channels", SHAPE, "network.channels", []),
        ("--network unet --network.dropout 1", SHAPE, "network.dropout", ["1"]),
        ("--network unet --network.time-scale 0", SHAPE, "network.time_scale", ["0"]),
        ("--network unet --network.heads 3", SHAPE, "network.heads", []),
        ("--network dit --network.channels 3", SHAPE, "network.channels", []),
        ("--network dit --network.heads 0", SHAPE, "network.heads", ["0"]),
        (
            "--network dit --network.heads 3 --network.head-channels 6",
            SHAPE,
            "network.head_channels",
            ["18", "multiple of 4"],
        ),
    ],
)
def test_networks_that_do_not_fit_the_images_are_refused(words, sample_shape, option, values):
    """The message names the option and contains the values."""
    with pytest.raises(ArgumentError) as error:
        spec = parse(TeachSpec, ["--out", "o", *words.split()], "teach")
        build_network(spec.network, sample_shape, CLASSES)
    message = as_options(str(error.value))
    assert f"--{option.replace('_', '-')}" in message
    assert all(value in message for value in values)
    assert "\n" not in message


# Sizes of the networks in the recipes, compared with their papers


def parameters(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(config, sample_shape, num_classes).parameters())


def test_the_unet_for_cifar10_has_the_size_of_openais():
    """torchcfm builds OpenAI's U-Net for flow matching on CIFAR-10 with exactly this number of parameters."""
    config = UNetConfig(
        channels=(128, 256, 256, 256), blocks=2, attention=(16,), head_channels=64, dropout=0.1, time_scale=1
    )
    without_classes, width = 35_746_307, 4 * 128
    assert parameters(config, (3, 32, 32), 10) == without_classes + 11 * width == 35_751_939


def test_dit_s_2_has_the_size_of_the_papers():
    """DiT-S/2 for 32 x 32 latents of 1000 classes has 33 M parameters in table 1 of the paper."""
    width, depth = 384, 12
    paper = 32_963_360
    embeddings = (256 + 1) * width + (width + 1) * width + 1001 * width  # embeddings of the time and the class
    own_embeddings = (depth - 1) * embeddings  # diffusers has one per block; the paper has one for all blocks
    positions = 256 * width  # the paper counts the fixed table of 256 tokens
    variances = (width + 1) * 2 * 2 * 4  # the paper's last layer also predicts the variance of the noise
    assert parameters(DiTConfig(), (4, 32, 32), 1000) == paper + own_embeddings - positions - variances == 39_798_928
