"""Flow-map distillation: one student for every step count.

The student's u(x_s, s, r) is the mean velocity of the way from s to r, so that one step is x_r = x_s - (s - r) u. It is
trained on pairs of stored knots of one trajectory, whose target is the chord (x_s - x_r) / (s - r): no network is
called for it, and where the path obeys a speed limit so does the target. At r = s the map is the teacher's velocity,
so the student begins with the teacher's weights and an end time without effect. Relatives learn such maps without
stored trajectories (flow maps, arXiv 2505.18825; TCD, 2402.19159; CMT, 2509.24526).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from kac.losses.protocol import Interval
from kac.losses.velocity_error import LossName, VelocityErrorOptions, velocity_loss
from kac.networks import Condition, VelocityNetwork
from kac.util.errors import ArgumentError

PairLaw = Literal["grids", "any", "length", "long"]

GRID_SHARE = 0.75
"""Of the pairs under ``grids``: those on the step counts that matter; the others keep the map whole between them."""


class FlowMapConfig(VelocityErrorOptions):
    """Land on every later knot of the teacher's trajectory: one student for all step counts."""

    kind: Literal["flow-map"] = Field("flow-map", description="flow-map: one student for every step count")
    pairs: PairLaw = Field(
        "grids",
        description="how two knots are drawn: grids: three of four times an interval of one of the step counts `grids`,"
        " else any; any: all pairs alike; length: all lengths alike; long: in proportion to the length",
    )
    grids: tuple[PositiveInt, ...] = Field(
        (1, 2, 4, 20), min_length=1, description="step counts that matter most; each divides the store's knots"
    )

    def build(self, steps: int, takes: tuple[Condition, ...] = ()) -> "FlowMapObjective":
        """The objective of a student that is told where a step ends, and ``takes``; the same for all step counts."""
        return FlowMapObjective(self.pairs, self.grids, ("end_time", *takes), self.loss, self.scales)


@dataclass(frozen=True)
class FlowMapObjective:
    """From any knot of a trajectory, land on any later one."""

    pairs: PairLaw = "grids"
    grids: tuple[int, ...] = (1, 2, 4, 20)
    conditions: tuple[Condition, ...] = ("end_time",)
    loss: LossName = "mse"
    scales: int = 1

    def knots(self, stored: int) -> range:
        """All of them.

        Raises:
            ArgumentError: a step count of ``grids`` that does not divide the stored knots.
        """
        for steps in self.grids if self.pairs == "grids" else ():
            if stored % steps:
                divisors = [m for m in range(1, stored + 1) if stored % m == 0]
                expected = f"expected divisors of the store's {stored} knots {divisors}"
                raise ArgumentError(f"`objective.grids`: {expected}, found {steps}")
        return range(stored + 1)

    def draw(self, uniforms: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Two knots by the law ``pairs``: [batch, 2] -> i and j > i."""
        i, j = torch.triu_indices(stored + 1, stored + 1, offset=1)
        cumulative = pair_probabilities(self.pairs, self.grids, stored)[i, j].cumsum(0)
        found = torch.searchsorted(cumulative, uniforms[:, 0].contiguous() * cumulative[-1], right=True)
        found = found.clamp(max=len(i) - 1)
        return i[found], j[found]

    def losses(self, network: VelocityNetwork, interval: Interval) -> dict[str, Tensor]:
        """|| u_student(x_s, s, label, r) - (x_s - x_r) / (s - r) ||^2 per coordinate.

        Raises:
            ArgumentError: more scales than the images can be halved.
        """
        given = interval.conditions(self.conditions)
        u = network(interval.x_start, interval.t_start, interval.label, **given)
        return {"flow_map": velocity_loss(u - interval.mean_velocity(), self.loss, self.scales)}


def pair_probabilities(law: PairLaw, grids: tuple[int, ...], stored: int) -> Tensor:
    """How likely a pair of knots is: [stored + 1, stored + 1], float64, above the diagonal; its sum is 1."""
    knot = torch.arange(stored + 1, dtype=torch.float64)
    length = (knot[None, :] - knot[:, None]).clamp(min=0)
    exists = (length > 0).double()
    any_pair = exists / exists.sum()
    if law == "any":
        return any_pair
    if law == "length":
        return exists / (stored + 1 - length) / stored
    if law == "long":
        return length / length.sum()
    on_grids = torch.zeros_like(any_pair)
    for steps in grids:
        ends = torch.arange(0, stored + 1, stored // steps)
        on_grids[ends[:-1], ends[1:]] += 1 / (steps * len(grids))
    return GRID_SHARE * on_grids + (1 - GRID_SHARE) * any_pair
