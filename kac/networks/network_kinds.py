"""The kinds of velocity networks.

To add a kind, write a module with its config and its ``NetworkModule``, and register both in this module.
"""

import contextlib
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field

from kac.networks.dit import DiT, DiTConfig
from kac.networks.mlp import MLPConfig, ResidualMLP
from kac.networks.outside import Outside, OutsideConfig
from kac.networks.unet import UNet, UNetConfig
from kac.networks.velocity import NetworkModule
from kac.util.options import expand_kind

NetworkConfig = Annotated[
    MLPConfig | UNetConfig | DiTConfig | OutsideConfig,
    Field(discriminator="kind", description="kind of velocity network; each kind has its own options"),
    BeforeValidator(expand_kind),
]
"""The config of a network of any kind. The command line, YAML files and a model's config.json use its fields."""

NETWORKS: dict[str, Callable[[Any, tuple[int, ...], int], NetworkModule]] = {
    "mlp": ResidualMLP,
    "unet": UNet,
    "dit": DiT,
    "outside": Outside,
}


def build_network(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> NetworkModule:
    """Return a freshly initialised network for samples of ``sample_shape`` and labels 0 .. num_classes - 1.

    Raises ``ArgumentError`` if the config does not fit the samples.
    """
    return NETWORKS[config.kind](config, sample_shape, num_classes)


def outline_network(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> NetworkModule:
    """Return a network on the meta device. Its weights have shapes but no values, and take no memory.

    A network of kind ``outside`` is built on the CPU, because its factory may need the values of tensors.
    """
    with contextlib.nullcontext() if isinstance(config, OutsideConfig) else torch.device("meta"):
        return build_network(config, sample_shape, num_classes)
