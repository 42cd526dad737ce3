"""Losses: flow matching for teachers; objectives and refinement for students."""

from kac.losses.objectives import (
    EndpointConfig,
    EndpointObjective,
    FlowMapConfig,
    FlowMapObjective,
    Interval,
    LossTerms,
    Objective,
    ObjectiveConfig,
    ReflowConfig,
    ReflowObjective,
)

__all__ = [
    "EndpointConfig",
    "EndpointObjective",
    "FlowMapConfig",
    "FlowMapObjective",
    "Interval",
    "LossTerms",
    "Objective",
    "ObjectiveConfig",
    "ReflowConfig",
    "ReflowObjective",
]
