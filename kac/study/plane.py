"""Claim: for mixtures in the plane, a Kac flow has bounded speed and a Gaussian flow does not (arXiv 2506.20641).

For samples that are points, this module records the trajectories, their ends and their speeds.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kac.metrics.distances import sliced_wasserstein
from kac.sampling import generate
from kac.study.subject import Subject, Watched

EDGE, CELLS = 1.25, 100
"""Densities are counted between -EDGE and EDGE, with this number of cells per side."""


class Travelled(NamedTuple):
    """The points of a flow at each network evaluation, and their speeds there."""

    t: Tensor  # [evaluations]
    x: Tensor  # [evaluations + 1, points, 2]; the last entry is the samples
    speed: Tensor  # [evaluations, points], the length |u| of the velocity

    @property
    def samples(self) -> Tensor:
        """The samples [points, 2]."""
        return self.x[-1]


def travel(subject: Subject) -> Travelled:
    """Follow all points of a subject, sampled without guidance by a solver with one evaluation per step."""
    parts = []
    for x_1, label in subject.starts():
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        network = Watched(subject.network, lambda x, t, u, seen=seen: seen.append((x.cpu(), t.cpu(), u.cpu())))  # type: ignore[misc]
        end = generate(network, x_1, label, subject.sampling).x.cpu()
        x, t, u = (torch.stack(column) for column in zip(*seen, strict=True))
        parts.append(Travelled(t, torch.cat([x, end[None]]), u.norm(dim=2)))
    x, speed = torch.cat([part.x for part in parts], 1), torch.cat([part.speed for part in parts], 1)
    return Travelled(parts[0].t, x, speed)


def density(points: Tensor) -> np.ndarray:
    """Count the points [points, 2] in each cell: [CELLS, CELLS], with the bottom row first."""
    edges = np.linspace(-EDGE, EDGE, CELLS + 1)
    counts: np.ndarray = np.histogram2d(points[:, 1].numpy(), points[:, 0].numpy(), bins=(edges, edges))[0]
    return counts


def distance_to(data: Tensor, points: Tensor) -> float:
    """Return the squared sliced 2-Wasserstein distance between samples [points, 2] and data [rows, 2]."""
    return sliced_wasserstein(data, points)
