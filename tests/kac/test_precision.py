"""Precision: bf16, channels_last and compiled calls agree with plain float32 within stated tolerances."""

import shutil

import pytest
import torch
from torch import nn

from kac.networks import DiTConfig, MLPConfig, NetworkConfig, NetworkModule, UNetConfig, build_network
from kac.precision import Precision
from kac.util.errors import ArgumentError
from kac.util.fingerprint import hashed_values

BFLOAT16_TOLERANCE = 0.05
"""Of the velocity's own size: bfloat16 keeps 8 bits, and the errors of four layers add up."""


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


class Convolution(nn.Module):
    """A network of images, in which the memory format matters."""

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


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def test_plain_float32_is_the_network_itself():
    network = mlp()
    assert Precision().wrap(network) is network


@pytest.mark.parametrize(("make", "shape"), [(mlp, (1, 8, 8)), (Convolution, (3, 8, 8))])
def test_bfloat16_agrees_within_its_tolerance_and_gives_float32(make, shape):
    network, (x, t, label) = make(), inputs(shape)
    wrapped = Precision(dtype="bfloat16").wrap(network)
    assert wrapped.null_label == network.null_label
    with torch.no_grad():
        exact, found = network(x, t, label), wrapped(x, t, label)
    assert found.dtype == torch.float32
    assert 0 < relative_error(found, exact) < BFLOAT16_TOLERANCE
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_channels_last_agrees_and_reaches_the_network():
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


def test_gradients_pass_through():
    network, (x, t, label) = mlp(), inputs((1, 8, 8))
    network(x, t, label).square().mean().backward()
    exact = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    Precision(dtype="bfloat16").wrap(network)(x, t, label).square().mean().backward()
    for found, expected in zip((p.grad for p in network.parameters()), exact, strict=True):
        assert relative_error(found, expected) < 2 * BFLOAT16_TOLERANCE or expected.norm() < 1e-6


UNET = UNetConfig(channels=(16, 32), blocks=1, attention=(4,), groups=8)
DIT = DiTConfig(heads=2, head_channels=16, depth=2, patch=2)

both = pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])


def backbone(config: NetworkConfig) -> NetworkModule:
    """A network of diffusers in training, all of whose layers take part."""
    torch.manual_seed(0)
    network = build_network(config, (3, 8, 8), 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def velocity_and_gradient(config: NetworkConfig, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocity [4, 3, 8, 8], and the gradient of its square in all weights as one vector."""
    network = backbone(config)
    velocity = precision.wrap(network)(*inputs())
    velocity.square().mean().backward()
    assert {p.dtype for p in network.parameters()} == {velocity.dtype} == {torch.float32}
    return velocity.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


def assert_agrees(config: NetworkConfig, precision: Precision, tolerance: float) -> None:
    """With plain float32, relative to the size of the whole; the gradient within twice the tolerance."""
    exact, exact_gradient = velocity_and_gradient(config, Precision())
    found, gradient = velocity_and_gradient(config, precision)
    assert relative_error(found, exact) < tolerance
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
def test_the_networks_of_diffusers_agree(config: NetworkConfig, precision: Precision, tolerance: float):
    """Norms and attention under autocast too, forward and backward."""
    assert_agrees(config, precision, tolerance)


@needs_compiler
@pytest.mark.parametrize(
    "config",
    [UNetConfig(channels=(8,), blocks=1, groups=8), DiTConfig(heads=2, head_channels=8, depth=1, patch=4)],
    ids=["unet", "dit"],
)
def test_the_compiled_networks_of_diffusers_agree(config: NetworkConfig):
    network, (x, t, label) = backbone(config).eval(), inputs()
    with torch.no_grad():
        found = Precision(compile=True, memory_format="channels_last").wrap(network)(x, t, label)
        assert relative_error(found, network(x, t, label)) < 1e-5


def test_choices_are_made_by_the_device():
    here = Precision(dtype="auto").on(gpu=False)
    assert (here.dtype, here.compile, here.memory_format) == ("float32", False, "contiguous")
    there = Precision(dtype="auto").on(gpu=True)
    assert (there.dtype, there.compile, there.memory_format) == ("bfloat16", True, "channels_last")
    assert Precision().on(gpu=True, convolutions=False).memory_format == "contiguous"
    assert Precision(compile=False, memory_format="contiguous").on(gpu=True) == Precision(
        compile=False, memory_format="contiguous"
    )
    assert str(there) == "bfloat16, channels_last, compiled"
    with pytest.raises(ArgumentError, match="expected float32, bfloat16 or auto without a GPU, found tf32"):
        Precision(dtype="tf32").wrap(mlp())


def test_only_the_type_decides_what_is_made():
    assert hashed_values(Precision(compile=True, memory_format="channels_last")) == {}
    assert hashed_values(Precision(dtype="bfloat16")) == {"dtype": "bfloat16"}
