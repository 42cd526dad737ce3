"""The energy distance (G. J. Szekely and M. L. Rizzo, J. Stat. Plan. Inference 143, 2013) between two sets of points.

    D = 2 E|X - Y| - E|X - X'| - E|Y - Y'| >= 0, and 0 only if X and Y have the same distribution.

X' and Y' are independent copies of X and Y.
"""

import torch
from torch import Tensor

TINY = 1e-12
"""Lower limit of squared distances, because the slope of their square root is infinite at 0."""


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of D from independent points x [n, width] and y [m, width], n, m >= 2; a scalar.

    Example:
        >>> points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> bool(energy_distance(points[:250], points[250:] + 1) > energy_distance(points[:250], points[250:]))
        True
    """
    return 2 * _distances(x, y).mean() - mean_distance(x) - mean_distance(y)


def mean_distance(x: Tensor) -> Tensor:
    """Mean distance between different points of x [n, width]; a scalar."""
    n = len(x)
    return _distances(x, x).masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), 0).sum() / (n * (n - 1))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances between the points x [n, width] and y [m, width]: [n, m].

    A matrix product makes the gradient many times faster than that of torch.cdist. The differences of large squares
    need float64.
    """
    dtype, x, y = x.dtype, x.double(), y.double()
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squared.clamp(min=TINY).sqrt().to(dtype)
