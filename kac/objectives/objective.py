"""Objectives by kind. A new kind is one module with its config and its ``Objective``, and a line in ``OBJECTIVES``."""

from kac.objectives.endpoint import EndpointConfig, EndpointObjective
from kac.objectives.protocol import Objective

ObjectiveConfig = EndpointConfig
"""The config of any kind; with several it is their union, told apart by ``kind``: see ``networks.network``."""

OBJECTIVES = {"endpoint": EndpointObjective}


def build_objective(config: ObjectiveConfig, steps: int) -> Objective:
    """What a student of ``steps`` macro steps learns."""
    return OBJECTIVES[config.kind](steps)
