"""Endpoint distillation: a student makes M Euler steps, each landing where the teacher's many small steps land."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from kac.losses.protocol import Interval
from kac.losses.velocity_error import LossName, VelocityErrorOptions, velocity_loss
from kac.networks import Condition, VelocityNetwork
from kac.util.errors import ArgumentError


class EndpointConfig(VelocityErrorOptions):
    """Land where the teacher lands."""

    kind: Literal["endpoint"] = Field("endpoint", description="endpoint: land where the teacher lands, on each step")

    def build(self, steps: int, takes: tuple[Condition, ...] = ()) -> "EndpointObjective":
        """The objective of a student of ``steps`` macro steps that is told ``takes``."""
        return EndpointObjective(steps, takes, self.loss, self.scales)


@dataclass(frozen=True)
class EndpointObjective:
    """On each of the student's ``steps`` intervals, land where the teacher lands (arXiv 2509.21513)."""

    steps: int
    conditions: tuple[Condition, ...] = ()
    loss: LossName = "mse"
    scales: int = 1

    def knots(self, stored: int) -> range:
        """Every ``stored / steps``-th knot.

        Raises:
            ArgumentError: ``steps`` does not divide the stored knots.
        """
        if self.steps < 1 or stored % self.steps:
            divisors = [m for m in range(1, stored + 1) if stored % m == 0]
            expected = f"expected a divisor of the store's {stored} knots {divisors}"
            raise ArgumentError(f"`steps`: {expected}, found {self.steps}")
        return range(0, stored + 1, stored // self.steps)

    def draw(self, uniforms: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """One of the ``steps`` intervals, equally likely: [batch, 2] -> k and k + 1."""
        k = (uniforms[:, 0] * self.steps).long()
        return k, k + 1

    def losses(self, network: VelocityNetwork, interval: Interval) -> dict[str, Tensor]:
        """The endpoint loss alone.

        Raises:
            ArgumentError: more scales than the images can be halved.
        """
        return {"endpoint": endpoint_loss(network, interval, self.loss, self.scales, self.conditions)}


def endpoint_loss(
    network: VelocityNetwork,
    interval: Interval,
    loss: LossName = "mse",
    scales: int = 1,
    conditions: tuple[Condition, ...] = (),
) -> Tensor:
    """|| x_start - h u_student(x_start, t_start, label) - x_end ||^2 / h^2 per coordinate, h = t_start - t_end.

    Divided by the squared step length it is a velocity error: one scale for all intervals and step counts.
    ``loss`` and ``scales`` are those of ``velocity_loss``.
    """
    given = interval.conditions(conditions)
    error = network(interval.x_start, interval.t_start, interval.label, **given) - interval.mean_velocity()
    return velocity_loss(error, loss, scales)
