"""Solvers of dx/dt = u(x, t) from noise to data on any decreasing time grid.

``nfe`` is the number of network evaluations.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kac.util.errors import check_known

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [batch, *sample], t scalar) -> velocity [batch, *sample]; attribute ``nfe_per_call``: evaluations (default 1)."""

Method = Literal["euler", "heun", "ab2"]

KnotGrid = Literal["uniform"]

GRIDS: dict[KnotGrid, Callable[[Tensor], Tensor]] = {"uniform": lambda share: share}
"""Functions from the fraction of remaining knots (1: noise, 0: image) to time. They increase and fix 0 and 1."""


class Solution(NamedTuple):
    """The final state of a flow and the requested intermediate states."""

    x: Tensor  # [batch, *sample], at times[-1]
    nfe: int
    knots: list[Tensor]  # one [batch, *sample] per index in ``keep``
    kinetic_energy: Tensor  # [batch], the integral of |u|^2 |dt|


def knot_times(knots: int, grid: KnotGrid = "uniform") -> Tensor:
    """The times t_0 = 1 > t_1 > ... > t_knots = 0: [knots + 1], float64, exact at both ends.

    Stored knots, student steps and solver steps all use this grid. ``knot_times(m) == knot_times(m * n)[::n]``.

    Example:
        >>> knot_times(4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]

    Raises:
        ValueError: fewer than one knot, or an unknown grid.
    """
    if knots < 1:
        raise ValueError(f"`knots` is {knots}, but must be at least 1.")
    check_known("grid", grid, GRIDS)
    return GRIDS[grid](torch.arange(knots, -1, -1, dtype=torch.float64) / knots)


def solve(velocity: Velocity, x: Tensor, times: Tensor, method: Method = "ab2", keep: Sequence[int] = ()) -> Solution:
    """Integrate from times[0] down to times[-1] with one solver step per interval of the grid.

    euler: x += h u_n.  heun: x += h (u_n + u(x + h u_n, t_{n+1})) / 2.
    ab2: x += h ((1 + ratio/2) u_n - (ratio/2) u_{n-1}), ratio = h / h_prev; the first step is an Euler step.
    The same rule integrates the kinetic energy. The orders of convergence are 1, 2 and 2.

    Args:
        x: [batch, *sample], the state at times[0].
        times: [steps + 1], strictly decreasing.
        keep: indices into ``times`` of the states to return, in this order. Other states are freed.

    Example:
        >>> solution = solve(lambda x, t: x, torch.ones(1, 1), knot_times(100), method="ab2")
        >>> round(solution.x.item(), 3), solution.nfe  # dx/dt = x from t = 1 to t = 0 divides x by e
        (0.368, 100)

    Raises:
        ValueError: an unknown method, times that do not decrease, or an index in ``keep`` outside the grid.
    """
    check_known("solver", method, STEPPERS)
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
        raise ValueError("`times` must be a strictly decreasing vector with at least 2 entries.")
    if not all(0 <= k < len(times) for k in keep):
        raise ValueError(f"`keep` is {list(keep)}, but its indices must be between 0 and {len(times) - 1}.")
    kept = {0: x}
    energy, calls = torch.zeros(len(x), dtype=x.dtype, device=x.device), 0
    for n, step in enumerate(STEPPERS[method](velocity, x, times.tolist()), start=1):
        x, energy, calls = step.x, energy + step.kinetic_energy, calls + step.calls
        if n in keep:
            kept[n] = x
    return Solution(x, calls * getattr(velocity, "nfe_per_call", 1), [kept[k] for k in keep], energy)


class _Step(NamedTuple):
    x: Tensor
    kinetic_energy: Tensor
    calls: int


def _euler(velocity: Velocity, x: Tensor, times: list[float]) -> Iterator[_Step]:
    for t, t_next in itertools.pairwise(times):
        h = t_next - t
        u = velocity(x, _scalar(t, x))
        x = x + h * u
        yield _Step(x, -h * _square_norm(u), 1)


def _heun(velocity: Velocity, x: Tensor, times: list[float]) -> Iterator[_Step]:
    for t, t_next in itertools.pairwise(times):
        h = t_next - t
        u = velocity(x, _scalar(t, x))
        u_next = velocity(x + h * u, _scalar(t_next, x))
        x = x + h / 2 * (u + u_next)
        yield _Step(x, -h / 2 * (_square_norm(u) + _square_norm(u_next)), 2)


def _ab2(velocity: Velocity, x: Tensor, times: list[float]) -> Iterator[_Step]:
    u_prev, h_prev = None, 0.0
    for t, t_next in itertools.pairwise(times):
        h = t_next - t
        u = velocity(x, _scalar(t, x))
        half_ratio = 0.0 if u_prev is None else h / h_prev / 2
        slope, power = (1 + half_ratio) * u, (1 + half_ratio) * _square_norm(u)
        if u_prev is not None:
            slope, power = slope - half_ratio * u_prev, power - half_ratio * _square_norm(u_prev)
        x = x + h * slope
        yield _Step(x, -h * power, 1)
        u_prev, h_prev = u, h


Stepper = Callable[[Velocity, Tensor, list[float]], Iterator[_Step]]

STEPPERS: dict[Method, Stepper] = {"euler": _euler, "heun": _heun, "ab2": _ab2}


def _scalar(t: float, x: Tensor) -> Tensor:
    # torch.full fills the scalar on the device. A copy from the host would wait for all pending GPU work.
    return torch.full((), t, dtype=x.dtype, device=x.device)


def _square_norm(u: Tensor) -> Tensor:
    return u.flatten(1).square().sum(1)
