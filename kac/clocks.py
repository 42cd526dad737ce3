"""Schedules of a path: the signal f(t), which scales the data, and the clock g(t), the time of the Kac process."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Schedule(NamedTuple):
    """A scalar function of t in [0, 1], its derivative, and the supremum of its absolute slope."""

    value: Callable[[Tensor], Tensor]  # maps t of any shape to values of that shape
    derivative: Callable[[Tensor], Tensor]
    slope_bound: float


SIGNALS = {"linear": Schedule(lambda t: 1 - t, lambda t: -torch.ones_like(t), 1.0)}
"""f(t), the weight of the data: f(0) = 1, f(1) = 0."""

CLOCKS = {
    "linear": Schedule(lambda t: t, torch.ones_like, 1.0),
    "quadratic": Schedule(lambda t: t * t, lambda t: 2 * t, 2.0),
}
"""g(t), the time of the Kac process at path time t: g(0) = 0."""

SignalName = Literal["linear"]
ClockName = Literal["linear", "quadratic"]
