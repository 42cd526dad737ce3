"""Precision: bfloat16, channels_last and compilation agree with plain float32 within tolerances."""

import shutil

import pytest
import torch
from torch import nn

from kac.networks import DiTConfig, MLPConfig, NetworkConfig, NetworkModule, UNetConfig, build_network
from kac.networks.diffusers import InputConv2d
from kac.precision import Precision
from kac.sampling import Sampling, generate
from kac.util.errors import ArgumentError
from kac.util.fingerprint import hashed_values

BFLOAT16_TOLERANCE = 0.05
"""Relative error of the velocity. bfloat16 has 8 bits, and the errors of four layers accumulate."""


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


class Convolution(nn.Module):
    """A convolutional network, to which the memory format applies."""

    null_label = 2

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
        self.seen = None

    def forward(self, x, t, label):
        self.seen = x
        return self.conv(x) + t.reshape(-1, 1, 1, 1) + label.reshape(-1, 1, 1, 1)


def inputs(shape=(3, 8, 8)):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, *shape, generator=generator), torch.rand(4, generator=generator), torch.arange(4) % 3


def mlp():
    torch.manual_seed(0)
    network = build_network(MLPConfig(width=64, depth=2), (1, 8, 8), 2)
    nn.init.normal_(network.leave[1].weight)
    return network


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


def test_plain_float32_returns_the_network_itself():
    network = mlp()
    assert Precision().wrap(network) is network


@pytest.mark.parametrize(("make", "shape"), [(mlp, (1, 8, 8)), (Convolution, (3, 8, 8))])
def test_bfloat16_agrees_with_float32_and_returns_float32(make, shape):
    network, (x, t, label) = make(), inputs(shape)
    wrapped = Precision(dtype="bfloat16").wrap(network)
    assert wrapped.null_label == network.null_label
    with torch.no_grad():
        exact, velocity = network(x, t, label), wrapped(x, t, label)
    assert velocity.dtype == torch.float32
    assert 0 < relative_error(velocity, exact) < BFLOAT16_TOLERANCE
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_a_wrapped_network_is_guided_by_its_guide_in_the_same_precision():
    network, (x, _, label) = mlp(), inputs((1, 8, 8))
    network.guide, dtypes = mlp(), set()
    nn.init.normal_(network.guide.leave[1].weight)  # other weights than the network's
    network.guide.leave[1].register_forward_hook(lambda layer, given, output: dtypes.add(output.dtype))
    exact, made = (
        generate(Precision(dtype=dtype).wrap(network), x, label, Sampling(1.0, 4, "euler")).x
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < relative_error(made, exact) < BFLOAT16_TOLERANCE
    assert dtypes == {torch.float32, torch.bfloat16}


def test_channels_last_agrees_and_is_applied_to_inputs_and_weights():
    network, (x, t, label) = Convolution(), inputs()
    exact = network(x, t, label)
    wrapped = Precision(memory_format="channels_last").wrap(network)
    torch.testing.assert_close(wrapped(x, t, label), exact, rtol=1e-5, atol=1e-5)
    assert network.seen.is_contiguous(memory_format=torch.channels_last)
    assert network.conv[0].weight.is_contiguous(memory_format=torch.channels_last)


@needs_compiler
def test_a_compiled_network_agrees():
    network, (x, t, label) = mlp(), inputs((1, 8, 8))
    wrapped = Precision(compile=True).wrap(network)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x, t, label), network(x, t, label), rtol=1e-4, atol=1e-5)


def test_gradients_agree():
    network, (x, t, label) = mlp(), inputs((1, 8, 8))
    network(x, t, label).square().mean().backward()
    exact = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    Precision(dtype="bfloat16").wrap(network)(x, t, label).square().mean().backward()
    for gradient, expected in zip((p.grad for p in network.parameters()), exact, strict=True):
        assert relative_error(gradient, expected) < 2 * BFLOAT16_TOLERANCE or expected.norm() < 1e-6


UNET = UNetConfig(channels=(16, 32), blocks=1, attention=(4,), groups=8)
DIT = DiTConfig(heads=2, head_channels=16, depth=2, patch=2)

both = pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])


def backbone(config: NetworkConfig) -> NetworkModule:
    """Return a diffusers network in training mode, with weights changed so that every layer affects the output."""
    torch.manual_seed(0)
    network = build_network(config, (3, 8, 8), 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def velocity_and_gradient(config: NetworkConfig, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the velocity [4, 3, 8, 8], and the gradient of its mean square in all weights, as one vector."""
    network = backbone(config)
    velocity = precision.wrap(network)(*inputs())
    velocity.square().mean().backward()
    assert {p.dtype for p in network.parameters()} == {velocity.dtype} == {torch.float32}
    return velocity.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


def assert_agrees(config: NetworkConfig, precision: Precision, tolerance: float) -> None:
    """Compare with plain float32 by relative error. The gradient may have twice the tolerance."""
    exact, exact_gradient = velocity_and_gradient(config, Precision())
    velocity, gradient = velocity_and_gradient(config, precision)
    assert relative_error(velocity, exact) < tolerance
    assert relative_error(gradient, exact_gradient) < 2 * tolerance


@both
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        (Precision(memory_format="channels_last"), 1e-5),
        (Precision(dtype="bfloat16"), BFLOAT16_TOLERANCE),
        (Precision(dtype="bfloat16", memory_format="channels_last"), BFLOAT16_TOLERANCE),
    ],
    ids=str,
)
def test_networks_of_diffusers_agree(config: NetworkConfig, precision: Precision, tolerance: float):
    """The networks include norms and attention under autocast, forward and backward."""
    assert_agrees(config, precision, tolerance)


@both
def test_the_first_layer_sees_noise_that_bfloat16_would_round_away(config: NetworkConfig):
    """A layer that takes differences of neighbouring pixels receives an image of -1 with noise of 0.001."""
    network, (x, t, label) = backbone(config), inputs()
    first = next(layer for layer in network.modules() if isinstance(layer, InputConv2d))
    with torch.no_grad():
        first.weight.sub_(first.weight.mean(dim=(1, 2, 3), keepdim=True))
        first.bias.zero_()
    outputs = []
    first.register_forward_hook(lambda layer, given, output: outputs.append(output[..., 1:-1, 1:-1]))
    with torch.no_grad():
        for dtype in ("float32", "bfloat16"):
            Precision(dtype=dtype).wrap(network)(-1 + 0.001 * x, t, label)
    assert [output.dtype for output in outputs] == [torch.float32, torch.bfloat16]
    assert relative_error(outputs[1].float(), outputs[0]) < 0.01


@needs_compiler
@pytest.mark.parametrize(
    "config",
    [UNetConfig(channels=(8,), blocks=1, groups=8), DiTConfig(heads=2, head_channels=8, depth=1, patch=4)],
    ids=["unet", "dit"],
)
def test_compiled_networks_of_diffusers_agree(config: NetworkConfig):
    network, (x, t, label) = backbone(config).eval(), inputs()
    with torch.no_grad():
        velocity = Precision(compile=True, memory_format="channels_last").wrap(network)(x, t, label)
        assert relative_error(velocity, network(x, t, label)) < 1e-5


def test_automatic_values_depend_on_the_device():
    on_cpu = Precision(dtype="auto").resolved(gpu=False)
    assert (on_cpu.dtype, on_cpu.compile, on_cpu.memory_format) == ("float32", False, "contiguous")
    on_gpu = Precision(dtype="auto").resolved(gpu=True)
    assert (on_gpu.dtype, on_gpu.compile, on_gpu.memory_format) == ("bfloat16", True, "channels_last")
    assert Precision().resolved(gpu=True, convolutions=False).memory_format == "contiguous"
    assert Precision(compile=False, memory_format="contiguous").resolved(gpu=True) == Precision(
        compile=False, memory_format="contiguous"
    )
    assert str(on_gpu) == "bfloat16, channels_last, compiled"
    with pytest.raises(ArgumentError, match=r"`precision\.dtype` tf32"):
        Precision(dtype="tf32").wrap(mlp())


def test_only_the_type_changes_the_fingerprint():
    assert hashed_values(Precision(compile=True, memory_format="channels_last")) == {}
    assert hashed_values(Precision(dtype="bfloat16")) == {"dtype": "bfloat16"}
