"""Velocity networks by kind.

A new kind is one module with its config and its ``nn.Module``, and a line in ``NETWORKS``. Once there are several,
``NetworkConfig`` is their union, told apart by ``kind``: command line, YAML and a model's config.json take all of them.
"""

from kac.networks.mlp import MLPConfig, ResidualMLP
from kac.networks.network import Condition, NetworkModule, VelocityNetwork, load_weights

__all__ = [
    "Condition",
    "MLPConfig",
    "NetworkConfig",
    "NetworkModule",
    "VelocityNetwork",
    "build_network",
    "load_weights",
]

NetworkConfig = MLPConfig

NETWORKS = {"mlp": ResidualMLP}


def build_network(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> NetworkModule:
    """A freshly initialised network for samples of ``sample_shape`` and labels 0 .. num_classes - 1."""
    return NETWORKS[config.kind](config, sample_shape, num_classes)
