"""How a velocity's error becomes a loss: what the objectives that follow the teacher have in common."""

from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.functional import avg_pool2d

from kac.util.errors import ArgumentError
from kac.util.options import Kinded

LossName = Literal["mse", "huber"]

HUBER_SCALE = 0.03
"""c / sqrt(d) of the pseudo-Huber loss, where a sample's error is measured as a norm over d coordinates: far below a
velocity, whose coordinates are about 1, so that most samples pull with equal force (c = 0.00054 sqrt(d) in
arXiv 2310.14189 is for errors a hundred times smaller)."""


class VelocityErrorOptions(Kinded):
    """How far a velocity is from the one that is to be learned."""

    loss: LossName = Field("mse", description="mse: the mean squared error; huber: grows linearly far from 0")
    scales: PositiveInt = Field(
        1, description="image sizes at which the error is taken, each half the one before; their losses are averaged"
    )


def velocity_loss(error: Tensor, loss: LossName = "mse", scales: int = 1) -> Tensor:
    """The loss of a velocity that is off by ``error`` [batch, *sample]; a scalar.

    Args:
        loss: ``mse`` is the mean square; ``huber`` takes of each sample sqrt(mean square + c^2) - c.
        scales: the same loss of the error averaged over 2x2, 4x4, ... pixels is added, and the mean taken.

    Raises:
        ArgumentError: more scales than the images can be halved.
    """
    return sum((_LOSSES[loss](part) for part in _pyramid(error, scales)), start=error.new_zeros(())) / scales


def _pyramid(error: Tensor, scales: int) -> list[Tensor]:
    """The error, and what is left of it when 2x2 pixels are averaged, again and again: ``scales`` in all."""
    parts = [error]
    for _ in range(scales - 1):
        if error.ndim != 4 or min(parts[-1].shape[2:]) < 2:
            expected = f"expected images that can be halved {scales - 1} times"
            raise ArgumentError(f"`objective.scales`: {expected}, found {list(error.shape[1:])}")
        parts.append(avg_pool2d(parts[-1], 2))
    return parts


def _mse(error: Tensor) -> Tensor:
    return error.square().mean()


def _pseudo_huber(error: Tensor) -> Tensor:
    mean_square = error.square().flatten(1).mean(1)
    return ((mean_square + HUBER_SCALE**2).sqrt() - HUBER_SCALE).mean()


_LOSSES = {"mse": _mse, "huber": _pseudo_huber}
