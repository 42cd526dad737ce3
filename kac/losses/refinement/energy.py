"""The energy distance of delivered samples to real images, class by class, with its gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kac.losses.refinement.spaces import RefinementSpace
from kac.util.images import delivered

TINY = 1e-12
"""Squared distances below it are none: their root has no slope."""


def straight_through(samples: Tensor) -> Tensor:
    """Samples as they are delivered; the gradient passes as if nothing had been clipped or rounded."""
    return samples + (delivered(samples) - samples).detach()


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of D from independent points x [n, width] and y [m, width], n, m >= 2; a scalar."""
    return 2 * _distances(x, y).mean() - _mean_distance(x) - _mean_distance(y)


def refinement_loss(
    samples: Tensor,
    label: Tensor | None,
    real: Tensor,
    real_label: Tensor,
    spaces: Sequence[RefinementSpace],
    class_weight: float,
    num_classes: int,
    update: int = 0,
) -> Tensor:
    """The mean over ``spaces`` of the energy distance between samples and real images, joined with their classes.

    Each space is measured by the mean distance between the real images in it, so that all count alike and the loss is
    about 1 for samples that have nothing in common with them; a scalar.

    Args:
        samples, real: [batch, *sample]; label, real_label: [batch]. Without a ``label`` classes are not compared.
        update: what random spaces are drawn by.
    """

    def one_hot(each: Tensor) -> Tensor:
        return class_weight / 2**0.5 * nn.functional.one_hot(each, num_classes).to(samples.dtype)

    classes, real_classes = ([], []) if label is None else ([one_hot(label)], [one_hot(real_label)])

    def distance(x: Tensor, y: Tensor) -> Tensor:
        unit = _mean_distance(y).detach().clamp(min=1e-6)
        return energy_distance(torch.cat([x / unit, *classes], 1), torch.cat([y / unit, *real_classes], 1))

    means = [
        torch.stack([distance(*pair) for pair in zip(space(samples, update), space(real, update), strict=True)]).mean()
        for space in spaces
    ]
    return torch.stack(means).mean()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Between the points x [n, width] and y [m, width]: [n, m].

    By a matrix product, which torch.cdist's gradient does without and so takes many times as long; in float64, since
    squares are subtracted, and then the result.
    """
    dtype, x, y = x.dtype, x.double(), y.double()
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squared.clamp(min=TINY).sqrt().to(dtype)


def _mean_distance(x: Tensor) -> Tensor:
    """Between different ones of the points x [n, width]."""
    n = len(x)
    return _distances(x, x).masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), 0).sum() / (n * (n - 1))
