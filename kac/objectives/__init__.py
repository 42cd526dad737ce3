"""Objectives: what a student learns from a store of its teacher's trajectories.

A new kind is one module with its config and its ``Objective``, and a line in ``OBJECTIVES``. Once there are several,
``ObjectiveConfig`` is the union of the configs, told apart by ``kind``.
"""

from kac.objectives.endpoint import EndpointConfig, EndpointObjective, endpoint_loss
from kac.objectives.objective import Interval, Objective

__all__ = [
    "EndpointConfig",
    "EndpointObjective",
    "Interval",
    "Objective",
    "ObjectiveConfig",
    "build_objective",
    "endpoint_loss",
]

ObjectiveConfig = EndpointConfig

OBJECTIVES = {"endpoint": EndpointObjective}


def build_objective(config: ObjectiveConfig, steps: int) -> Objective:
    """What a student of ``steps`` macro steps learns."""
    return OBJECTIVES[config.kind](steps)
