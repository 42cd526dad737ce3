"""Claim: a Kac flow keeps a speed limit, and Gaussian flow matching has none (arXiv 2509.21513, 2506.20641).

For data in [-1, 1] no component of the true velocity exceeds sup|f'| + c sup g' (``Path.speed_limit``). A network
only approximates that field: how much of what it computes while it samples is beyond the limit is measured here.
"""

import math

import torch
from torch import Tensor

from kac.sampling import generate
from kac.study.subject import Subject, Watched
from kac.util.errors import DivergedError

BINS = 80
TOP = 2.0
"""The histogram ends at so many limits; what is beyond is in its last bin."""


class Speeds:
    """What was met of |u|, coordinate by coordinate.

    Args:
        limit: what the speeds are compared with.
    """

    def __init__(self, limit: float) -> None:
        if not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"expected a positive speed limit, found {limit}")
        self.limit, self.count, self.beyond, self.largest = limit, 0, 0, 0.0
        self.bins = torch.zeros(BINS, dtype=torch.int64)

    def see(self, u: Tensor) -> None:
        """Count velocities [batch, *sample] in.

        Raises:
            DivergedError: values that are not finite.
        """
        speed = u.detach().abs().flatten()
        largest = speed.max().item()
        if not math.isfinite(largest):
            raise DivergedError("expected finite velocities of the model, found NaN or infinity: it has diverged")
        place = (speed * (BINS / (TOP * self.limit))).clamp(max=BINS - 1).long()
        self.bins += torch.bincount(place, minlength=BINS).cpu()
        self.count += speed.numel()
        self.beyond += int((speed > self.limit).sum())
        self.largest = max(self.largest, largest)

    @property
    def share_beyond(self) -> float:
        """The share of all components that are beyond the limit."""
        return self.beyond / self.count

    def density(self) -> tuple[list[float], list[float]]:
        """The histogram's edges [BINS + 1], and the density in each bin [BINS]."""
        width = TOP * self.limit / BINS
        return [i * width for i in range(BINS + 1)], (self.bins.double() / (self.count * width)).tolist()


def speeds(subject: Subject, limit: float) -> Speeds:
    """The speeds of every velocity that the network computes while the subject is sampled."""
    met = Speeds(limit)
    network = Watched(subject.network, lambda x, t, u: met.see(u))
    for x_1, label in subject.starts():
        generate(network, x_1, label, subject.sampling)
    return met
