"""Distances between two sets of features."""

import torch
from torch import Tensor

from kac.metrics.statistics import Moments

SLICES = 256
ROWS_PER_BLOCK = 1000


def frechet_distance(real: Moments, fake: Moments) -> float:
    """Return |mu_r - mu_f|^2 + Tr(S_r + S_f - 2 (S_r S_f)^(1/2)).

    This function uses the symmetric root of S_r, which ``real`` caches. For wide features, this is much faster than
    computing the eigenvalues of S_r S_f, as torchmetrics does, and gives the same result.

    Example:
        >>> real, fake = Moments(width=2), Moments(width=2)
        >>> real.add(torch.tensor([[0.0, 0.0], [2.0, 2.0]]))
        >>> fake.add(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        >>> round(frechet_distance(real, fake), 6)  # the means differ by (1, 0), the covariances are equal
        1.0

    Args:
        real, fake: moments of at least two rows each.
    """
    cross = torch.linalg.eigvalsh(real.root @ fake.covariance @ real.root).clamp_min(0).sqrt().sum()
    gap = real.mean - fake.mean
    return float(gap @ gap + real.covariance.trace() + fake.covariance.trace() - 2 * cross)


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Return the KID (arXiv 1801.01401): the unbiased squared MMD with the kernel (x.y / width + 1)^3.

    This function uses all pairs of rows. The usual mean over random subsets has the same expectation, but more noise.

    Example:
        >>> kernel_distance(torch.zeros(3, 2), torch.zeros(4, 2))
        0.0

    Args:
        real, fake: features [rows, width] of at least two rows each.
    """
    within = []
    for rows in (real, fake):
        diagonal = float((rows.double().square().mean(1) + 1).pow(3).sum())
        within.append((_kernel_sum(rows, rows) - diagonal) / (len(rows) * (len(rows) - 1)))
    return within[0] + within[1] - 2 * _kernel_sum(real, fake) / (len(real) * len(fake))


def _kernel_sum(rows: Tensor, others: Tensor) -> float:
    kernels = (part @ others.T / rows.shape[1] + 1 for part in torch.split(rows, ROWS_PER_BLOCK))
    return sum(float((kernel * kernel * kernel).sum(dtype=torch.float64)) for kernel in kernels)


def sliced_wasserstein(real: Tensor, fake: Tensor) -> float:
    """Return the squared 2-Wasserstein distance of two sets [rows, width], averaged over ``SLICES`` random directions.

    Sets of different sizes are compared by their quantiles. The number of quantiles is the size of the smaller set.

    Example:
        >>> round(sliced_wasserstein(torch.zeros(8, 1), torch.full((6, 1), 0.5)), 3)
        0.25
    """
    directions = torch.randn(real.shape[1], SLICES, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=0)
    count = min(len(real), len(fake))
    a, b = (_quantiles(rows @ directions, count) for rows in (real, fake))
    return float((a - b).square().mean())


def _quantiles(values: Tensor, count: int) -> Tensor:
    """Return ``count`` quantiles of each column of [rows, columns], in increasing order."""
    ordered = values.double().sort(dim=0).values
    if len(ordered) == count:
        return ordered
    positions = (torch.arange(count, dtype=torch.float64) + 0.5) / count * len(ordered) - 0.5
    below = positions.floor().long().clamp(0, len(ordered) - 2)
    return torch.lerp(ordered[below], ordered[below + 1], (positions - below)[:, None])


def nearest_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return the Euclidean distance [rows] from each row [rows, width] to the nearest row of ``others``."""
    return torch.cat([torch.cdist(part, others).amin(1) for part in torch.split(rows, ROWS_PER_BLOCK)])


def neighbour_radii(rows: Tensor, k: int = 3) -> Tensor:
    """Return the distance [rows] from each row [rows, width] to its k-th nearest neighbour, excluding itself."""
    parts = [torch.cdist(part, rows).kthvalue(k + 1, dim=1).values for part in torch.split(rows, ROWS_PER_BLOCK)]
    return torch.cat(parts)


def coverage(rows: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the fraction of ``rows`` within the radius of at least one centre (arXiv 1904.06991).

    This is precision if the rows are samples and the centres are real data, and recall if the two are swapped.
    """
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in torch.split(rows, ROWS_PER_BLOCK)]
    return float(torch.cat(inside).double().mean())
