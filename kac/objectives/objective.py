"""Objectives by kind. A new kind is one module with its config and ``Objective``; the config joins the union here."""

from kac.objectives.endpoint import EndpointConfig
from kac.objectives.protocol import Objective

ObjectiveConfig = EndpointConfig
"""The config of any kind; with several it is ``Annotated[A | B, Field(discriminator="kind"),
BeforeValidator(kind_alone)]``, which the command line, YAML and Python all take."""


def build_objective(config: ObjectiveConfig, steps: int) -> Objective:
    """What a student of ``steps`` macro steps learns."""
    return config.build(steps)
