"""Losses: flow matching for teachers; objectives and refinement for students."""

from kac.losses.endpoint import EndpointConfig, EndpointObjective
from kac.losses.flow_map import FlowMapConfig, FlowMapObjective
from kac.losses.objective import ObjectiveConfig
from kac.losses.protocol import Interval, LossTerms, Objective

__all__ = [
    "EndpointConfig",
    "EndpointObjective",
    "FlowMapConfig",
    "FlowMapObjective",
    "Interval",
    "LossTerms",
    "Objective",
    "ObjectiveConfig",
]
