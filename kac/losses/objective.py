"""Objectives by kind. A new kind is one module with its config and ``Objective``; the config joins the union here."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from kac.losses.endpoint import EndpointConfig
from kac.losses.flow_map import FlowMapConfig
from kac.losses.protocol import Objective
from kac.networks import Condition
from kac.util.options import kind_alone

ObjectiveConfig = Annotated[
    EndpointConfig | FlowMapConfig,
    Field(discriminator="kind", description="what the student learns, and its options"),
    BeforeValidator(kind_alone),
]
"""The config of any kind, as the command line, YAML and Python all take it."""


def build_objective(config: ObjectiveConfig, steps: int, takes: tuple[Condition, ...] = ()) -> Objective:
    """What a student of ``steps`` macro steps learns.

    Args:
        takes: what its network takes beside time and label whatever the objective is: ``guidance`` for all scales.
    """
    return config.build(steps, takes)
