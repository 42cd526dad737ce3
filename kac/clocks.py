"""Schedules of a path: the signal f(t), which scales the data, and the clock g(t), the time of the Kac process.

Each schedule computes its value and its derivative together.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class ScheduleValue(NamedTuple):
    """A schedule evaluated at given times, with its derivative."""

    value: Tensor
    derivative: Tensor


class Schedule(NamedTuple):
    """A scalar function of t on [0, 1] with the supremum of its absolute slope."""

    at: Callable[[Tensor], ScheduleValue]  # t in [0, 1], any shape
    slope_bound: float


SIGNALS = {"linear": Schedule(lambda t: ScheduleValue(1 - t, -torch.ones_like(t)), 1.0)}
"""f(t), the weight of the data: f(0) = 1, f(1) = 0."""

CLOCKS = {
    "linear": Schedule(lambda t: ScheduleValue(t, torch.ones_like(t)), 1.0),
    "quadratic": Schedule(lambda t: ScheduleValue(t * t, 2 * t), 2.0),
}
"""g(t), the time of the Kac process at path time t: g(0) = 0."""

SignalName = Literal["linear"]
ClockName = Literal["linear", "quadratic"]
