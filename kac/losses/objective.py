"""All objectives. To add one, write a module with its config and its ``Objective``, and register the config here."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from kac.losses.endpoint import EndpointConfig
from kac.losses.flow_map import FlowMapConfig
from kac.util.options import expand_kind

OBJECTIVES = EndpointConfig | FlowMapConfig
"""The configs of all objectives. The method ``build`` of a config returns the ``Objective``."""

ObjectiveConfig = Annotated[
    OBJECTIVES,
    Field(discriminator="kind", description="training objective of the student"),
    BeforeValidator(expand_kind),
]
"""The config of any objective. The string "flow-map" is short for its default config."""
