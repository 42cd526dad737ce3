"""Distances between two sets of features."""

import torch
from torch import Tensor

from kac.metrics.statistics import Moments

SLICES = 256
ROWS_A_BLOCK = 1000


def frechet_distance(real: Moments, fake: Moments) -> float:
    """|mu_r - mu_f|^2 + Tr(S_r + S_f - 2 (S_r S_f)^(1/2)), of at least two rows each.

    Through the symmetric root of S_r, which is kept with it: for wide features much faster than torchmetrics'
    eigenvalues of S_r S_f, which are the same.
    """
    cross = torch.linalg.eigvalsh(real.root @ fake.covariance @ real.root).clamp_min(0).sqrt().sum()
    gap = real.mean - fake.mean
    return float(gap @ gap + real.covariance.trace() + fake.covariance.trace() - 2 * cross)


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """KID (arXiv 1801.01401): the unbiased squared MMD of the kernel (x.y / width + 1)^3, of at least two rows each.

    Over all pairs of [rows, width], which has the expectation of the usual mean over random subsets, and less noise.
    """
    within = [
        (_kernel_sum(rows, rows) - _kernel_diagonal(rows)) / (len(rows) * (len(rows) - 1)) for rows in (real, fake)
    ]
    return within[0] + within[1] - 2 * _kernel_sum(real, fake) / (len(real) * len(fake))


def _kernel_sum(rows: Tensor, others: Tensor) -> float:
    kernels = (part @ others.T / rows.shape[1] + 1 for part in torch.split(rows, ROWS_A_BLOCK))
    return sum(float((kernel * kernel * kernel).sum(dtype=torch.float64)) for kernel in kernels)


def _kernel_diagonal(rows: Tensor) -> float:
    return float((rows.double().square().mean(1) + 1).pow(3).sum())


def sliced_wasserstein(real: Tensor, fake: Tensor) -> float:
    """The squared 2-Wasserstein distance of [rows, width] along ``SLICES`` random directions, their mean.

    Sets of unequal size are compared at as many quantiles as the smaller one has rows.
    """
    directions = torch.randn(real.shape[1], SLICES, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=0)
    count = min(len(real), len(fake))
    a, b = (_quantiles(rows @ directions, count) for rows in (real, fake))
    return float((a - b).square().mean())


def _quantiles(values: Tensor, count: int) -> Tensor:
    """``count`` quantiles of each column of [rows, columns], by increasing value."""
    ordered = values.double().sort(dim=0).values
    if len(ordered) == count:
        return ordered
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count * len(ordered) - 0.5
    below = places.floor().long().clamp(0, len(ordered) - 2)
    return torch.lerp(ordered[below], ordered[below + 1], (places - below)[:, None])


def nearest_distances(rows: Tensor, others: Tensor) -> Tensor:
    """The Euclidean distance of each of ``rows`` [rows, width] to the nearest of ``others``: [rows]."""
    return torch.cat([torch.cdist(part, others).amin(1) for part in torch.split(rows, ROWS_A_BLOCK)])


def neighbour_radii(rows: Tensor, k: int = 3) -> Tensor:
    """The distance of each of [rows, width] to its k-th nearest other row: [rows]."""
    parts = [torch.cdist(part, rows).kthvalue(k + 1, dim=1).values for part in torch.split(rows, ROWS_A_BLOCK)]
    return torch.cat(parts)


def coverage(rows: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of ``rows`` within the radius of at least one centre (arXiv 1904.06991).

    With real centres and samples as rows this is precision, the other way round it is recall.
    """
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in torch.split(rows, ROWS_A_BLOCK)]
    return float(torch.cat(inside).double().mean())
