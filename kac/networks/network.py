"""Networks by kind. A new kind is one module with its config and ``NetworkModule``, both of which are entered here."""

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
from kac.util.options import kind_alone

NetworkConfig = Annotated[
    MLPConfig | UNetConfig | DiTConfig | OutsideConfig,
    Field(discriminator="kind", description="kind of the velocity network, and its options"),
    BeforeValidator(kind_alone),
]
"""The config of any kind, as the command line, YAML and a model's config.json all take it."""

NETWORKS: dict[str, Callable[[Any, tuple[int, ...], int], NetworkModule]] = {
    "mlp": ResidualMLP,
    "unet": UNet,
    "dit": DiT,
    "outside": Outside,
}


def build_network(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> NetworkModule:
    """A freshly initialised network for samples of ``sample_shape`` and labels 0 .. num_classes - 1.

    Raises:
        ArgumentError: samples that this kind, or these options of it, do not fit.
    """
    return NETWORKS[config.kind](config, sample_shape, num_classes)


def outline_network(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> NetworkModule:
    """The network with weights that have shapes and no numbers, on the meta device: nothing is allocated.

    A module from outside is built as it is, since its factory may need numbers.

    Raises:
        ArgumentError: as ``build_network``.
    """
    with torch.device("meta") if config.builds_on_meta else contextlib.nullcontext():
        return build_network(config, sample_shape, num_classes)
