"""Endpoint distillation: a student takes M Euler steps, each of which ends where many small teacher steps end."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from kac.losses.protocol import Interval, LossTerms, check_divides_knots
from kac.losses.velocity_error import LossName, VelocityErrorOptions, velocity_loss
from kac.networks import Condition, VelocityNetwork


class EndpointConfig(VelocityErrorOptions):
    """Options of endpoint distillation."""

    kind: Literal["endpoint"] = Field("endpoint", description="endpoint: match the teacher at the end of each step")

    def build(self, steps: int, takes: tuple[Condition, ...] = ()) -> "EndpointObjective":
        """The objective of a student with ``steps`` steps whose network has the inputs ``takes``."""
        return EndpointObjective(steps, takes, self.loss, self.scales)


@dataclass(frozen=True)
class EndpointObjective:
    """Match the teacher at the end of each of the ``steps`` student steps (arXiv 2509.21513)."""

    steps: int
    conditions: tuple[Condition, ...] = ()
    loss: LossName = "mse"
    scales: int = 1

    def knots(self, stored: int) -> range:
        """Every ``stored / steps``-th knot.

        Raises:
            ArgumentError: ``steps`` does not divide the stored knots.
        """
        check_divides_knots("steps", self.steps, stored)
        return range(0, stored + 1, stored // self.steps)

    def draw(self, uniforms: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """One of the ``steps`` intervals with equal probability: [batch, 2] -> k and k + 1."""
        k = (uniforms[:, 0] * self.steps).long()
        return k, k + 1

    def losses(self, network: VelocityNetwork, interval: Interval) -> LossTerms:
        """The endpoint loss.

        Raises:
            ArgumentError: the images are too small for ``scales``.
        """
        return LossTerms({"endpoint": endpoint_loss(network, interval, self.loss, self.scales, self.conditions)})


def endpoint_loss(
    network: VelocityNetwork,
    interval: Interval,
    loss: LossName = "mse",
    scales: int = 1,
    conditions: tuple[Condition, ...] = (),
) -> Tensor:
    """|| x_start - h u_student(x_start, t_start, label) - x_end ||^2 / h^2 per coordinate, h = t_start - t_end.

    Division by the squared step length makes it a velocity error, comparable across intervals and step counts.

    Example:
        >>> import torch
        >>> from kac.losses import Interval
        >>> from kac.networks import MLPConfig, build_network
        >>> network = build_network(MLPConfig(width=8, depth=1), (2,), num_classes=3)
        >>> start, end, label = torch.zeros(4, 2), torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
        >>> interval = Interval(start, end, torch.ones(4), torch.zeros(4), label, guidance=torch.zeros(4))
        >>> endpoint_loss(network, interval).shape
        torch.Size([])

    Args:
        loss, scales: as in ``velocity_loss``.
        conditions: further inputs of the network.
    """
    inputs = interval.conditions(conditions)
    error = network(interval.x_start, interval.t_start, interval.label, **inputs) - interval.mean_velocity()
    return velocity_loss(error, loss, scales)
