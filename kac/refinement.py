"""Refinement: a student's images are brought to the training images, class by class; the data are what it learns now.

A student that follows its teacher can be no better than the teacher. Here images are drawn from the student in a few
steps, delivered, and compared with real ones by an energy distance (G. J. Szekely and M. L. Rizzo, J. Stat. Plan.
Inference 143, 2013) in one or several spaces:

    D = 2 E|X - Y| - E|X - X'| - E|Y - Y'| >= 0, and 0 only where X and Y have one law.

X and Y are joined with their classes, so that each class is matched with itself. The objective of the student stays as
the anchor: without it precision is lost.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from kac.images import delivered
from kac.options import Kinded, kind_alone

SpaceName = Literal["pixels", "pooled"]


class NoRefinementConfig(Kinded):
    """The student follows its teacher alone."""

    kind: Literal["none"] = Field("none", description="none: follow the teacher alone")


class DataRefinementConfig(Kinded):
    """Bring the student's images to the training images."""

    kind: Literal["data"] = Field("data", description="data: bring the student's images to the training images as well")
    anchor: NonNegativeFloat = Field(1.0, description="weight of the objective beside the energy distance")
    steps: tuple[PositiveInt, ...] = Field(
        (1, 1, 2, 4),
        min_length=1,
        description="step counts that an any-step student is sampled with, in turn; others are with their own",
    )
    spaces: tuple[SpaceName, ...] = Field(
        ("pixels",), min_length=1, description="where images are compared: pixels; pooled: means of 4x4 pixels"
    )
    class_weight: NonNegativeFloat = Field(
        0.5, description="distance between images of different classes, in mean distances between real images"
    )


RefinementConfig = Annotated[
    NoRefinementConfig | DataRefinementConfig,
    Field(discriminator="kind", description="what a student learns beside its teacher, and the options of that"),
    BeforeValidator(kind_alone),
]
"""The config of any kind, as the command line, YAML and Python all take it."""


def straight_through(samples: Tensor) -> Tensor:
    """Samples as they are delivered; the gradient passes as if nothing had been clipped or rounded."""
    return samples + (delivered(samples) - samples).detach()


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of D from independent points x [n, width] and y [m, width], n, m >= 2; a scalar."""
    return 2 * torch.cdist(x, y).mean() - _mean_distance(x) - _mean_distance(y)


def refinement_loss(
    samples: Tensor,
    label: Tensor,
    real: Tensor,
    real_label: Tensor,
    spaces: Sequence[nn.Module],
    class_weight: float,
    num_classes: int,
) -> Tensor:
    """The mean over ``spaces`` of the energy distance between samples and real images, joined with their classes.

    Each space is measured by the mean distance between the real images in it, so that all count alike and the loss is
    about 1 for samples that have nothing in common with them; a scalar.

    Args:
        samples, real: [batch, *sample]; label, real_label: [batch].
        spaces: [batch, *sample] -> [batch, width] each.
    """
    classes, real_classes = (
        class_weight / 2**0.5 * nn.functional.one_hot(each, num_classes).to(samples.dtype)
        for each in (label, real_label)
    )
    total = samples.new_zeros(())
    for space in spaces:
        x, y = space(samples), space(real)
        unit = _mean_distance(y).detach().clamp(min=1e-6)
        total = total + energy_distance(torch.cat([x / unit, classes], 1), torch.cat([y / unit, real_classes], 1))
    return total / len(spaces)


def _mean_distance(x: Tensor) -> Tensor:
    """Between different ones of the points x [n, width]."""
    return nn.functional.pdist(x).mean()


class Pixels(nn.Module):
    """The flattened sample."""

    def forward(self, samples: Tensor) -> Tensor:
        """[batch, *sample] -> [batch, width]."""
        return samples.flatten(1)


class Pooled(nn.Module):
    """The means of 4x4 pixels: what an image is from afar."""

    def forward(self, samples: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, channels height width / 16]."""
        return nn.functional.avg_pool2d(samples, 4).flatten(1)


SPACES: dict[SpaceName, type[nn.Module]] = {"pixels": Pixels, "pooled": Pooled}
