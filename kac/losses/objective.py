"""All objectives. To add one, write a module with its config and ``Objective``, and add the config to this union."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from kac.losses.endpoint import EndpointConfig
from kac.losses.flow_map import FlowMapConfig
from kac.losses.protocol import Objective
from kac.networks import Condition
from kac.util.options import expand_kind

ObjectiveConfig = Annotated[
    EndpointConfig | FlowMapConfig,
    Field(discriminator="kind", description="training objective of the student"),
    BeforeValidator(expand_kind),
]
"""The config of any objective. The string "flow-map" is short for its default config."""


def build_objective(config: ObjectiveConfig, steps: int, takes: tuple[Condition, ...] = ()) -> Objective:
    """The objective of a student with ``steps`` steps.

    Args:
        takes: network inputs, besides time and label, that any objective may have, such as ``guidance``.
    """
    return config.build(steps, takes)
