"""Endpoint distillation: a student makes M Euler steps, each landing where the teacher's many small steps land."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.functional import avg_pool2d

from kac.networks import Condition, VelocityNetwork
from kac.objectives.protocol import Interval
from kac.options import Kinded, OptionError

EndpointLoss = Literal["mse", "huber"]

HUBER_SCALE = 0.03
"""c / sqrt(d) of the pseudo-Huber loss, where a sample's error is measured as a norm over d coordinates: far below a
velocity, whose coordinates are about 1, so that most samples pull with equal force (c = 0.00054 sqrt(d) in
arXiv 2310.14189 is for errors a hundred times smaller)."""


class EndpointConfig(Kinded):
    """Land where the teacher lands."""

    kind: Literal["endpoint"] = Field("endpoint", description="endpoint: land where the teacher lands, on each step")
    loss: EndpointLoss = Field("mse", description="mse: the mean squared error; huber: grows linearly far from 0")
    scales: PositiveInt = Field(
        1, description="image sizes at which the error is taken, each half the one before; their losses are averaged"
    )

    def build(self, steps: int) -> "EndpointObjective":
        """The objective of a student of ``steps`` macro steps."""
        return EndpointObjective(steps, loss=self.loss, scales=self.scales)


@dataclass(frozen=True)
class EndpointObjective:
    """On each of the student's ``steps`` intervals, land where the teacher lands (arXiv 2509.21513)."""

    steps: int
    conditions: tuple[Condition, ...] = ()
    loss: EndpointLoss = "mse"
    scales: int = 1

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
        """The endpoint loss alone.

        Raises:
            OptionError: more scales than the images can be halved.
        """
        return {"endpoint": endpoint_loss(network, interval, self.loss, self.scales)}


def endpoint_loss(network: VelocityNetwork, interval: Interval, loss: EndpointLoss = "mse", scales: int = 1) -> Tensor:
    """|| x_start - h u_student(x_start, t_start, label) - x_end ||^2 / h^2 per coordinate, h = t_start - t_end.

    Divided by the squared step length it is a velocity error: one scale for all intervals and step counts.

    Args:
        loss: ``huber`` replaces the squared norm of a sample's error by sqrt(norm^2 + c^2) - c.
        scales: the same loss of the error averaged over 2x2, 4x4, ... pixels is added, and the mean taken.
    """
    x_start, x_end, t_start, t_end, label = interval
    h = (t_start - t_end).reshape(-1, *[1] * (x_start.ndim - 1))
    error = network(x_start, t_start, label) - (x_start - x_end) / h
    return sum((_LOSSES[loss](part) for part in _pyramid(error, scales)), start=error.new_zeros(())) / scales


def _pyramid(error: Tensor, scales: int) -> list[Tensor]:
    """The error, and what is left of it when 2x2 pixels are averaged, again and again: ``scales`` in all."""
    parts = [error]
    for _ in range(scales - 1):
        if error.ndim != 4 or min(parts[-1].shape[2:]) < 2:
            expected = f"expected images that can be halved {scales - 1} times"
            raise OptionError(f"--objective.scales: {expected}, found {list(error.shape[1:])}")
        parts.append(avg_pool2d(parts[-1], 2))
    return parts


def _mse(error: Tensor) -> Tensor:
    return error.square().mean()


def _pseudo_huber(error: Tensor) -> Tensor:
    mean_square = error.square().flatten(1).mean(1)
    return ((mean_square + HUBER_SCALE**2).sqrt() - HUBER_SCALE).mean()


_LOSSES = {"mse": _mse, "huber": _pseudo_huber}
