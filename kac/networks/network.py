"""Networks by kind. A new kind is one module with its config and ``NetworkModule``, both of which are entered here."""

from kac.networks.mlp import MLPConfig, ResidualMLP
from kac.networks.velocity import NetworkModule

NetworkConfig = MLPConfig
"""The config of any kind; with several it is ``Annotated[A | B, Field(discriminator="kind"),
BeforeValidator(kind_alone)]``, which the command line, YAML and a model's config.json all take."""

NETWORKS = {"mlp": ResidualMLP}


def build_network(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> NetworkModule:
    """A freshly initialised network for samples of ``sample_shape`` and labels 0 .. num_classes - 1."""
    return NETWORKS[config.kind](config, sample_shape, num_classes)
