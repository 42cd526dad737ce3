"""Flow-map distillation: one student for every number of steps.

The student's u(x_s, s, r) is the mean velocity from time s to time r, so one step is x_r = x_s - (s - r) u. It is
trained on pairs of stored knots of the same trajectory. The target is the chord (x_s - x_r) / (s - r), which needs no
network call and obeys any speed limit that the trajectory obeys. At r = s the map equals the teacher's velocity, so the
student starts from the teacher's weights and initially ignores the end time. Related methods learn such maps without
stored trajectories (flow maps, arXiv 2505.18825; TCD, 2402.19159; CMT, 2509.24526).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from kac.losses.protocol import Interval, LossTerms, check_divides_knots
from kac.losses.velocity_error import LossName, VelocityErrorOptions, velocity_loss
from kac.networks import Condition, VelocityNetwork

PairLaw = Literal["grids", "any", "length", "long"]

GRID_SHARE = 0.75
"""Fraction of pairs drawn from the step counts ``grids``. The other pairs train the map between these grids."""


class FlowMapConfig(VelocityErrorOptions):
    """Options of flow-map distillation."""

    kind: Literal["flow-map"] = Field("flow-map", description="flow-map: one student for every number of steps")
    pairs: PairLaw = Field(
        "grids",
        description="distribution of knot pairs; grids: 3/4 are student steps of `grids`, 1/4 uniform; "
        "any: uniform over pairs; length: uniform over lengths; long: proportional to length",
    )
    grids: tuple[PositiveInt, ...] = Field(
        (1, 2, 4, 20), min_length=1, description="step counts to favour; each divides the number of stored knots"
    )

    def build(self, steps: int, takes: tuple[Condition, ...] = ()) -> "FlowMapObjective":
        """The objective of a student whose network takes the end time and ``takes``; independent of ``steps``."""
        return FlowMapObjective(self.pairs, self.grids, ("end_time", *takes), self.loss, self.scales)


@dataclass(frozen=True)
class FlowMapObjective:
    """From any knot of a trajectory, step to any later knot."""

    pairs: PairLaw = "grids"
    grids: tuple[int, ...] = (1, 2, 4, 20)
    conditions: tuple[Condition, ...] = ("end_time",)
    loss: LossName = "mse"
    scales: int = 1

    def knots(self, stored: int) -> range:
        """All stored knots.

        Raises:
            ArgumentError: a step count in ``grids`` does not divide the stored knots.
        """
        for steps in self.grids if self.pairs == "grids" else ():
            check_divides_knots("objective.grids", steps, stored)
        return range(stored + 1)

    def draw(self, uniforms: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Two knots with the distribution ``pairs``: [batch, 2] -> i and j > i."""
        i, j = torch.triu_indices(stored + 1, stored + 1, offset=1)
        cumulative = pair_probabilities(self.pairs, self.grids, stored)[i, j].cumsum(0)
        pair = torch.searchsorted(cumulative, uniforms[:, 0].contiguous() * cumulative[-1], right=True)
        pair = pair.clamp(max=len(i) - 1)
        return i[pair], j[pair]

    def losses(self, network: VelocityNetwork, interval: Interval) -> LossTerms:
        """|| u_student(x_s, s, label, r) - (x_s - x_r) / (s - r) ||^2 per coordinate.

        Raises:
            ArgumentError: the images are too small for ``scales``.
        """
        inputs = interval.conditions(self.conditions)
        u = network(interval.x_start, interval.t_start, interval.label, **inputs)
        return LossTerms({"flow_map": velocity_loss(u - interval.mean_velocity(), self.loss, self.scales)})


def pair_probabilities(law: PairLaw, grids: tuple[int, ...], stored: int) -> Tensor:
    """Probabilities of knot pairs: [stored + 1, stored + 1], float64, zero on and below the diagonal, with sum 1."""
    knot = torch.arange(stored + 1, dtype=torch.float64)
    length = (knot[None, :] - knot[:, None]).clamp(min=0)
    is_pair = (length > 0).double()
    any_pair = is_pair / is_pair.sum()
    if law == "any":
        return any_pair
    if law == "length":
        return is_pair / (stored + 1 - length) / stored
    if law == "long":
        return length / length.sum()
    on_grids = torch.zeros_like(any_pair)
    for steps in grids:
        ends = torch.arange(0, stored + 1, stored // steps)
        on_grids[ends[:-1], ends[1:]] += 1 / (steps * len(grids))
    return GRID_SHARE * on_grids + (1 - GRID_SHARE) * any_pair
