"""Losses of a velocity error, shared by the objectives."""

from collections.abc import Callable
from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.functional import avg_pool2d

from kac.util.errors import ArgumentError
from kac.util.options import Kinded

LossName = Literal["mse", "huber"]

HUBER_SCALE = 0.03
"""c / sqrt(d) of the pseudo-Huber loss, whose norm covers the d coordinates of a sample.

It is far smaller than a velocity, whose coordinates are about 1, so most samples have gradients of equal norm.
arXiv 2310.14189 uses c = 0.00054 sqrt(d) for errors that are about a hundred times smaller.
"""


class VelocityErrorOptions(Kinded):
    """Options of the loss of a velocity error."""

    loss: LossName = Field("mse", description="mse: mean squared error; huber: grows linearly for large errors")
    scales: PositiveInt = Field(
        1, description="number of image sizes, each half the previous one, over which the loss is averaged"
    )


def velocity_loss(error: Tensor, loss: LossName = "mse", scales: int = 1) -> Tensor:
    """The loss of the velocity error ``error`` [batch, *sample]; a scalar.

    Args:
        loss: ``mse`` is the mean square; ``huber`` is sqrt(mean square + c^2) - c per sample.
        scales: average the losses of the error pooled over 1x1, 2x2, 4x4, ... pixels.

    Raises:
        ArgumentError: the images are too small for ``scales``.
    """
    return sum((VELOCITY_LOSSES[loss](part) for part in _pyramid(error, scales)), start=error.new_zeros(())) / scales


def _pyramid(error: Tensor, scales: int) -> list[Tensor]:
    """The error at ``scales`` image sizes, each obtained by averaging 2x2 pixels of the previous one."""
    parts = [error]
    for _ in range(scales - 1):
        if error.ndim != 4 or min(parts[-1].shape[2:]) < 2:
            problem = f"samples of shape {list(error.shape[1:])} cannot be halved {scales - 1} times"
            raise ArgumentError(f"`objective.scales` {scales} is too large: {problem}. Choose a smaller value.")
        parts.append(avg_pool2d(parts[-1], 2))
    return parts


def _mse(error: Tensor) -> Tensor:
    return error.square().mean()


def _pseudo_huber(error: Tensor) -> Tensor:
    mean_square = error.square().flatten(1).mean(1)
    return ((mean_square + HUBER_SCALE**2).sqrt() - HUBER_SCALE).mean()


VELOCITY_LOSSES: dict[LossName, Callable[[Tensor], Tensor]] = {"mse": _mse, "huber": _pseudo_huber}
