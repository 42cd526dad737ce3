"""Objectives: what a student learns from a store of its teacher's trajectories."""

from kac.objectives.endpoint import EndpointConfig, EndpointObjective
from kac.objectives.flow_map import FlowMapConfig, FlowMapObjective
from kac.objectives.objective import ObjectiveConfig, build_objective
from kac.objectives.protocol import Interval, Objective

__all__ = [
    "EndpointConfig",
    "EndpointObjective",
    "FlowMapConfig",
    "FlowMapObjective",
    "Interval",
    "Objective",
    "ObjectiveConfig",
    "build_objective",
]
