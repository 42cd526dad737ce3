"""A small network of every kind, for digits."""

from collections.abc import Callable

import diffusers

from kac.networks import Condition, DiTConfig, MLPConfig, NetworkConfig, UNetConfig, build_network
from kac.networks.diffusers_model import DiffusersModelConfig
from kac.networks.velocity import NetworkModule
from kac.path import KacPath
from tests.kac.diffusers_folders import SHAPE, unet

CLASSES = 10

CONFIGS: dict[str, Callable[[], NetworkConfig]] = {
    "mlp": lambda: MLPConfig(width=8, depth=1),
    "bounded": lambda: MLPConfig(width=8, depth=1, bounded=True),
    "unet": lambda: UNetConfig(channels=(8, 8), blocks=1, groups=4),
    "dit": lambda: DiTConfig(heads=2, head_channels=4, depth=1),
    "diffusers": lambda: DiffusersModelConfig(
        model={**unet(CLASSES + 1).config, "_class_name": "UNet2DModel"},
        scheduler={**diffusers.DDPMScheduler().config, "_class_name": "DDPMScheduler"},
        labels="with_null",
    ),
}


def network_of(kind: str, conditions: tuple[Condition, ...] = ()) -> NetworkModule:
    """Return a teacher's network, or a student's with these conditions."""
    config = CONFIGS[kind]()
    if conditions:
        config = config.for_student(conditions, config.bounded)
    return build_network(config, SHAPE, CLASSES, KacPath())
