"""The kinds of velocity networks.

To add a kind, write a module with its config and its ``NetworkModule``, and register both in this module.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from kac.networks.diffusers_model import DiffusersModel, DiffusersModelConfig
from kac.networks.dit import DiT, DiTConfig
from kac.networks.mlp import MLPConfig, ResidualMLP
from kac.networks.outside import Outside, OutsideConfig
from kac.networks.unet import UNet, UNetConfig
from kac.networks.velocity import NetworkModule
from kac.path import KacPath, Path
from kac.util.errors import ArgumentError
from kac.util.options import expand_kind

NETWORK_KIND = Field(discriminator="kind", description="kind of velocity network; each kind has its own options")

NetworkChoice = Annotated[
    MLPConfig | UNetConfig | DiTConfig | OutsideConfig, NETWORK_KIND, BeforeValidator(expand_kind)
]
"""The config of a network that a user can choose, on the command line or in a YAML file."""

NetworkConfig = Annotated[
    MLPConfig | UNetConfig | DiTConfig | OutsideConfig | DiffusersModelConfig,
    NETWORK_KIND,
    BeforeValidator(expand_kind),
]
"""The config of a network of any kind, as in a model's config.json."""

NETWORKS: dict[str, Callable[[Any, tuple[int, ...], int], NetworkModule]] = {
    "mlp": ResidualMLP,
    "unet": UNet,
    "dit": DiT,
    "outside": Outside,
    "diffusers": DiffusersModel,
}


def build_network(
    config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int, path: Path | None = None
) -> NetworkModule:
    """Return a freshly initialised network for samples of ``sample_shape`` and labels 0 .. num_classes - 1.

    Args:
        path: the path whose speed limit a ``bounded`` network obeys; other networks do not need it.

    Raises:
        ArgumentError: the config does not fit the samples, or a bounded network has no path with a speed limit.
    """
    network = NETWORKS[config.kind](config, sample_shape, num_classes)
    if config.bounded:
        network.register_forward_hook(SpeedClamp(path_with_limit(path)))
    return network


def path_with_limit(path: Path | None) -> KacPath:
    """Return ``path``. Raise ``ArgumentError`` unless it has a speed limit."""
    if not isinstance(path, KacPath):
        raise ArgumentError("`network.bounded` needs a path with a speed limit. Choose `path` kac.")
    return path


@dataclass(frozen=True)
class SpeedClamp:
    """A forward hook that clamps each component of a velocity network's output to the path's speed limit at t.

    The exact velocities lie within these bounds, so clamping never increases an error. Clocks have increasing slopes,
    so the limit at the start of a student step also bounds the mean velocity of the step. In training the output is not
    clamped, because a clamped component has no gradient.
    """

    path: KacPath

    def __call__(self, network: NetworkModule, inputs: tuple[Any, ...], u: Tensor) -> Tensor:
        """Return the clamped velocity [batch, *sample] for the inputs x, t (scalar or [batch]) and label."""
        if network.training:
            return u
        limit = self.path.speed_limit_at(inputs[1].float()).reshape(-1, *[1] * (u.ndim - 1))
        return torch.maximum(torch.minimum(u, limit), -limit)


def outline_network(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> NetworkModule:
    """Return a network on the meta device. Its weights have shapes but no values, and take no memory.

    A network of kind ``outside`` is built on the CPU, because its factory may need the values of tensors.
    """
    with contextlib.nullcontext() if isinstance(config, OutsideConfig) else torch.device("meta"):
        return NETWORKS[config.kind](config, sample_shape, num_classes)
