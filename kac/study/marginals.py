"""Claim: the flow carries noise through the marginals of the path, x_t = f(t) x_0 + K_{g(t)} (arXiv 2506.20641).

At each time, the states of a well-trained teacher have the distribution of data noised to that time. This module
measures the sliced Wasserstein distance between the two, and its floor: the distance between two independent sets of
noised data.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kac.data import Dataset
from kac.metrics.distances import sliced_wasserstein
from kac.path import Path


class Marginal(NamedTuple):
    """The squared sliced 2-Wasserstein distance between states at one time and noised data, with its floor."""

    t: float
    distance: float
    floor: float


def marginal(states: Tensor, t: float, path: Path, data: Dataset, generator: torch.Generator) -> Marginal:
    """Compare states [rows, *sample] at time ``t`` with the same number of training images noised to ``t``."""
    first, second = (noised(path, data, t, len(states), generator).flatten(1) for _ in range(2))
    return Marginal(t, sliced_wasserstein(first, states.flatten(1).float()), sliced_wasserstein(first, second))


def noised(path: Path, data: Dataset, t: float, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` training images with replacement, and noise them to time ``t``: [count, *sample]."""
    x_0 = data.train.rows(torch.randint(len(data.train), (count,), generator=generator)).images
    return path.sample(x_0, torch.tensor(t), generator).x_t
