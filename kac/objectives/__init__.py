"""Objectives: what a student learns from a store of its teacher's trajectories."""

from kac.objectives.endpoint import EndpointConfig, EndpointObjective
from kac.objectives.objective import ObjectiveConfig, build_objective
from kac.objectives.protocol import Interval, Objective

__all__ = ["EndpointConfig", "EndpointObjective", "Interval", "Objective", "ObjectiveConfig", "build_objective"]
