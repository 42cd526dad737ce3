"""Solvers of dx/dt = u(x, t) from noise to data: one signature, any decreasing grid; ``nfe``: network evaluations."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kac.util.errors import check_known

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [batch, *sample], t scalar) -> velocity [batch, *sample]; ``nfe_per_call`` tells what a call costs (default 1)."""

Method = Literal["euler", "heun", "ab2"]

KnotGrid = Literal["uniform"]

GRIDS: dict[KnotGrid, Callable[[Tensor], Tensor]] = {"uniform": lambda share: share}
"""The share of the knots still to come (1 at the noise, 0 at the image) to time: increasing, 0 to 0 and 1 to 1."""


class Solution(NamedTuple):
    """Where the flow ended, and the states on the way that were asked for."""

    x: Tensor  # [batch, *sample], at times[-1]
    nfe: int
    knots: list[Tensor]  # one [batch, *sample] for each kept index
    kinetic_energy: Tensor  # [batch], the integral of |u|^2 |dt|


def knot_times(knots: int, grid: KnotGrid = "uniform") -> Tensor:
    """The times t_0 = 1 > t_1 > ... > t_knots = 0 of the knots 0 .. knots: [knots + 1], float64, exact at both ends.

    The only grid: of stored knots, a student's steps and solver steps. ``knot_times(m) == knot_times(m * n)[::n]``.

    Raises:
        ValueError: less than one knot, or an unknown grid.
    """
    if knots < 1:
        raise ValueError(f"knots must be at least 1, got {knots}")
    check_known("grid", grid, GRIDS)
    return GRIDS[grid](torch.arange(knots, -1, -1, dtype=torch.float64) / knots)


def solve(velocity: Velocity, x: Tensor, times: Tensor, method: Method = "ab2", keep: Sequence[int] = ()) -> Solution:
    """Integrate from times[0] down to times[-1], one solver step for each gap of the grid.

    euler: x += h u_n.  heun: x += h (u_n + u(x + h u_n, t_{n+1})) / 2.
    ab2: x += h ((1 + ratio/2) u_n - (ratio/2) u_{n-1}), ratio = h / h_prev; the first step is Euler's.
    The kinetic energy is integrated by the same rule. Orders 1, 2, 2.

    Args:
        x: [batch, *sample], the state at times[0].
        times: [steps + 1], strictly decreasing.
        keep: indices into ``times`` whose states are returned, in that order; nothing else is kept.

    Raises:
        ValueError: an unknown method, a grid that does not decrease, or a kept index outside it.
    """
    check_known("solver", method, STEPPERS)
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
        raise ValueError("times must be a strictly decreasing vector of at least 2 entries")
    if not all(0 <= k < len(times) for k in keep):
        raise ValueError(f"keep must lie within 0..{len(times) - 1}, got {list(keep)}")
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
    # Filled on the device: for a copy of a number the host would wait until a GPU has done all that is before it.
    return torch.full((), t, dtype=x.dtype, device=x.device)


def _square_norm(u: Tensor) -> Tensor:
    return u.flatten(1).square().sum(1)
