"""Claim: the flow carries noise through the marginals of the path, x_t = f(t) x_0 + K_{g(t)} (arXiv 2506.20641).

A teacher that learned its field well has at each time the distribution of data noised to that time. Measured is their
sliced Wasserstein distance, beside its floor: that of two independent sets of noised data.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kac.data import Dataset
from kac.metrics.distances import sliced_wasserstein
from kac.path import Path


class Marginal(NamedTuple):
    """How far the states of one time are from noised data: squared sliced 2-Wasserstein distances."""

    t: float
    distance: float
    floor: float


def marginal(states: Tensor, t: float, path: Path, data: Dataset, generator: torch.Generator) -> Marginal:
    """Compare ``states`` [rows, *sample] of the time ``t`` with as many training images noised to it."""
    first, second = (noised(path, data, t, len(states), generator).flatten(1) for _ in range(2))
    return Marginal(t, sliced_wasserstein(first, states.flatten(1).float()), sliced_wasserstein(first, second))


def noised(path: Path, data: Dataset, t: float, count: int, generator: torch.Generator) -> Tensor:
    """``count`` training images, drawn with replacement, noised to the time ``t``: [count, *sample]."""
    x_0 = data.train.rows(torch.randint(len(data.train), (count,), generator=generator)).images
    return path.sample(x_0, torch.tensor(t), generator).x_t
