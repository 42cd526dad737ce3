"""The energy distance between delivered samples and training images, class by class."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kac.losses.refinement.spaces import RefinementSpace
from kac.util.images import delivered

TINY = 1e-12
"""Lower limit of squared distances, because the slope of their square root is infinite at 0."""


def straight_through(samples: Tensor) -> Tensor:
    """Delivered samples, whose gradient ignores the clipping and rounding."""
    return samples + (delivered(samples) - samples).detach()


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of D from independent points x [n, width] and y [m, width], n, m >= 2; a scalar.

    Example:
        >>> points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> bool(energy_distance(points[:250], points[250:] + 1) > energy_distance(points[:250], points[250:]))
        True
    """
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
    """The energy distance between samples and real images of the same class, averaged over ``spaces``; a scalar.

    Distances are divided by the mean distance between real images, so all spaces have equal weight and the loss is
    about 1 for samples unrelated to the data.

    Args:
        samples, real: [batch, *sample].
        label, real_label: [batch]. If ``label`` is None, classes are ignored.
        class_weight: distance between images of different classes, in the same unit.
        update: seed of random spaces.
    """

    def one_hot(classes: Tensor) -> Tensor:
        return class_weight / 2**0.5 * nn.functional.one_hot(classes, num_classes).to(samples.dtype)

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
    """Distances between the points x [n, width] and y [m, width]: [n, m].

    A matrix product makes the gradient many times faster than that of torch.cdist. The differences of large squares
    need float64.
    """
    dtype, x, y = x.dtype, x.double(), y.double()
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squared.clamp(min=TINY).sqrt().to(dtype)


def _mean_distance(x: Tensor) -> Tensor:
    """Mean distance between different points of x [n, width]."""
    n = len(x)
    return _distances(x, x).masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), 0).sum() / (n * (n - 1))
