"""Velocity networks u(x, t, label). ``network_kinds.py`` lists them by kind."""

from kac.networks.dit import DiTConfig
from kac.networks.mlp import MLPConfig
from kac.networks.network_kinds import NetworkConfig, build_network, outline_network
from kac.networks.outside import OutsideConfig
from kac.networks.unet import UNetConfig
from kac.networks.velocity import Condition, Conditioning, NetworkModule, VelocityNetwork, load_weights

__all__ = [
    "Condition",
    "Conditioning",
    "DiTConfig",
    "MLPConfig",
    "NetworkConfig",
    "NetworkModule",
    "OutsideConfig",
    "UNetConfig",
    "VelocityNetwork",
    "build_network",
    "load_weights",
    "outline_network",
]
