"""Solvers of dx/dt = u(x, t) from noise to data on any decreasing time grid.

``nfe`` is the number of network evaluations.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kac.util.errors import check_known

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Maps x [batch, *sample] and a scalar t to a velocity [batch, *sample]. Attribute ``nfe_per_call``: default 1."""

SolverName = Literal["euler", "heun", "ab2", "ab2-euler"]

KnotGrid = Literal["uniform", "quadratic"]

GRIDS: dict[KnotGrid, Callable[[Tensor], Tensor]] = {"uniform": lambda share: share, "quadratic": torch.square}
"""Increasing functions that map the fraction of remaining knots (noise 1, image 0) to time: f(0) = 0 and f(1) = 1.

``quadratic`` takes its shortest steps near the image, where the velocity of a Kac flow of images changes fastest.
"""


class Solution(NamedTuple):
    """The final state of a flow and the requested intermediate states."""

    x: Tensor  # [batch, *sample], at times[-1]
    nfe: int
    knots: list[Tensor]  # one [batch, *sample] per index in ``keep``
    kinetic_energy: Tensor  # [batch], the integral of |u|^2 |dt|


def knot_times(knots: int, grid: KnotGrid = "uniform", device: torch.device | str = "cpu") -> Tensor:
    """Return the times t_0 = 1 > t_1 > ... > t_knots = 0: [knots + 1], float64, exact at both ends.

    Stored knots, student steps and solver steps all use this grid. ``knot_times(m) == knot_times(m * n)[::n]``.

    Example:
        >>> knot_times(4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
        >>> knot_times(4, "quadratic").tolist()
        [1.0, 0.5625, 0.25, 0.0625, 0.0]

    Raises:
        ValueError: ``knots`` is below 1, or ``grid`` is unknown.
    """
    if knots < 1:
        raise ValueError(f"`knots` is {knots}, but must be at least 1.")
    check_known("grid", grid, GRIDS)
    left = torch.arange(knots, -1, -1, dtype=torch.float64, device=device)
    # A GPU divides by a number inexactly, through its reciprocal, but by a tensor exactly.
    return GRIDS[grid](left / left[0])


def solve(
    velocity: Velocity, x: Tensor, times: Tensor, method: SolverName = "ab2", keep: Sequence[int] = ()
) -> Solution:
    """Integrate from times[0] down to times[-1] with one solver step per interval of the grid.

    euler: x += h u_n.  heun: x += h (u_n + u(x + h u_n, t_{n+1})) / 2.
    ab2: x += h ((1 + ratio/2) u_n - (ratio/2) u_{n-1}), ratio = h / h_prev; the first step is an Euler step.
    ab2-euler: steps that start above t = 1/4 are AB-2 steps, all others Euler steps, because a Kac velocity changes too
    fast near the image to be extrapolated.
    The kinetic energy is integrated by the same rule. The orders of convergence are 1, 2, 2 and 1.

    Args:
        x: [batch, *sample], the state at times[0].
        times: [steps + 1], strictly decreasing.
        keep: indices into ``times`` of the states to return, in the order given. All other states are freed.

    Example:
        >>> solution = solve(lambda x, t: x, torch.ones(1, 1), knot_times(100), method="ab2")
        >>> round(solution.x.item(), 3), solution.nfe  # dx/dt = x from t = 1 to t = 0 divides x by e
        (0.368, 100)

    Raises:
        ValueError: ``method`` is unknown, ``times`` does not decrease, or ``keep`` has an index outside ``times``.
    """
    check_known("solver", method, SOLVERS)
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
        raise ValueError("`times` must be a strictly decreasing vector with at least 2 entries.")
    if not all(0 <= k < len(times) for k in keep):
        raise ValueError(f"`keep` is {list(keep)}, but its indices must be between 0 and {len(times) - 1}.")
    kept, calls, last = {0: x}, 0, None
    energy = torch.zeros(len(x), dtype=x.dtype, device=x.device)

    def evaluate(x: Tensor, t: float) -> _Slope:
        nonlocal calls
        calls += 1
        # torch.full fills the scalar on the device. A copy from the host would wait for all pending GPU work.
        u = velocity(x, torch.full((), t, dtype=x.dtype, device=x.device))
        return _Slope(u, u.flatten(1).square().sum(1))

    for n, (t, t_next) in enumerate(itertools.pairwise(times.tolist()), start=1):
        now, h = evaluate(x, t), t_next - t
        mean = SOLVERS[method](_Step(evaluate, x, t, t_next, h, now, last))
        x, energy, last = x + h * mean.u, energy - h * mean.power, (now, h)
        if n in keep:
            kept[n] = x
    return Solution(x, calls * getattr(velocity, "nfe_per_call", 1), [kept[k] for k in keep], energy)


def evaluations(steps: int, method: SolverName) -> int:
    """Return the number of network evaluations of ``steps`` solver steps without guidance."""
    return solve(lambda x, t: x, torch.zeros(1, 1), knot_times(steps), method).nfe


class _Slope(NamedTuple):
    u: Tensor  # [batch, *sample], a velocity or a weighted sum of velocities
    power: Tensor  # [batch], |velocity|^2, or the sum of |velocity|^2 with the same weights

    def plus(self, weight: float, other: "_Slope", other_weight: float) -> "_Slope":
        return _Slope(*(weight * a + other_weight * b for a, b in zip(self, other, strict=True)))


class _Step(NamedTuple):
    evaluate: Callable[[Tensor, float], _Slope]
    x: Tensor  # state at the start of the step
    t: float
    t_next: float
    h: float  # negative
    now: _Slope  # slope at the start of the step
    last: tuple[_Slope, float] | None  # ``now`` and ``h`` of the previous step


def _heun(step: _Step) -> _Slope:
    return step.now.plus(0.5, step.evaluate(step.x + step.h * step.now.u, step.t_next), 0.5)


def _ab2(step: _Step) -> _Slope:
    if step.last is None:
        return step.now
    slope, h = step.last
    half_ratio = step.h / h / 2
    return step.now.plus(1 + half_ratio, slope, -half_ratio)


SOLVERS: dict[SolverName, Callable[[_Step], _Slope]] = {
    "euler": lambda step: step.now,
    "heun": _heun,
    "ab2": _ab2,
    "ab2-euler": lambda step: _ab2(step) if step.t > 0.25 else step.now,
}
"""Each function returns the slope u of a solver's step from x to x + h u."""
