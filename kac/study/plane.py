"""Claim: on mixtures of the plane a Kac flow travels at bounded speed; a Gaussian one has no bound (arXiv 2506.20641).

For samples that are points: where they end, some of the ways there, and how fast they are travelled.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kac.metrics.distances import sliced_wasserstein
from kac.sampling import generate
from kac.study.subject import Subject, Watched

EDGE, CELLS = 1.25, 100
"""Densities are counted in so many cells a side, between -EDGE and EDGE."""


class Travelled(NamedTuple):
    """The points of a flow at each of its network evaluations, and their speeds there."""

    t: Tensor  # [evaluations]
    x: Tensor  # [evaluations + 1, points, 2]: the last are the samples
    speed: Tensor  # [evaluations, points], |u|, the length of the velocity

    @property
    def samples(self) -> Tensor:
        """[points, 2]."""
        return self.x[-1]


def travel(subject: Subject) -> Travelled:
    """Follow all points of a subject that is sampled without guidance, by a solver of one evaluation a step."""
    parts = []
    for x_1, label in subject.starts():
        met: list[tuple[Tensor, Tensor, Tensor]] = []
        network = Watched(subject.network, lambda x, t, u, met=met: met.append((x.cpu(), t.cpu(), u.cpu())))  # type: ignore[misc]
        end = generate(network, x_1, label, subject.sampling).x.cpu()
        x, t, u = (torch.stack(column) for column in zip(*met, strict=True))
        parts.append(Travelled(t, torch.cat([x, end[None]]), u.norm(dim=2)))
    x, speed = torch.cat([part.x for part in parts], 1), torch.cat([part.speed for part in parts], 1)
    return Travelled(parts[0].t, x, speed)


def density(points: Tensor) -> np.ndarray:
    """How many of [points, 2] are in each cell: [CELLS, CELLS], rows from below."""
    edges = np.linspace(-EDGE, EDGE, CELLS + 1)
    counts: np.ndarray = np.histogram2d(points[:, 1].numpy(), points[:, 0].numpy(), bins=(edges, edges))[0]
    return counts


def distance_to(data: Tensor, points: Tensor) -> float:
    """The squared sliced 2-Wasserstein distance of samples [points, 2] to data [rows, 2]."""
    return sliced_wasserstein(data, points)
