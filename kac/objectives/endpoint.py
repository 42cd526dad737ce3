"""Endpoint distillation: a student makes M Euler steps, each landing where the teacher's many small steps land."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from kac.networks import Condition, VelocityNetwork
from kac.objectives.protocol import Interval
from kac.options import Kinded, OptionError


class EndpointConfig(Kinded):
    """Land where the teacher lands."""

    kind: Literal["endpoint"] = Field("endpoint", description="endpoint: land where the teacher lands, on each step")

    def build(self, steps: int) -> "EndpointObjective":
        """The objective of a student of ``steps`` macro steps."""
        return EndpointObjective(steps)


@dataclass(frozen=True)
class EndpointObjective:
    """On each of the student's ``steps`` intervals, land where the teacher lands (arXiv 2509.21513)."""

    steps: int
    conditions: tuple[Condition, ...] = ()

    def knots(self, stored: int) -> range:
        """Every ``stored / steps``-th knot.

        Raises:
            OptionError: ``steps`` does not divide the stored knots.
        """
        if self.steps < 1 or stored % self.steps:
            divisors = [m for m in range(1, stored + 1) if stored % m == 0]
            expected = f"expected a divisor of the store's {stored} knots {divisors}"
            raise OptionError(f"--steps: {expected}, found {self.steps}")
        return range(0, stored + 1, stored // self.steps)

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """One of the ``steps`` intervals, equally likely: [batch, 2] -> k and k + 1."""
        k = (uniforms[:, 0] * self.steps).long()
        return k, k + 1

    def losses(self, network: VelocityNetwork, interval: Interval) -> dict[str, Tensor]:
        """The endpoint loss alone."""
        return {"endpoint": endpoint_loss(network, interval)}


def endpoint_loss(network: VelocityNetwork, interval: Interval) -> Tensor:
    """|| x_start - h u_student(x_start, t_start, label) - x_end ||^2 / h^2 per coordinate, h = t_start - t_end.

    Divided by the squared step length it is a velocity error: one scale for all intervals and step counts.
    """
    x_start, x_end, t_start, t_end, label = interval
    h = (t_start - t_end).reshape(-1, *[1] * (x_start.ndim - 1))
    return (network(x_start, t_start, label) - (x_start - x_end) / h).square().mean()
