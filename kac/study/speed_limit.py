"""Claim: a Kac flow obeys a speed limit, and Gaussian flow matching has none (arXiv 2509.21513, 2506.20641).

For data in [-1, 1], no component of the true velocity exceeds sup|f'| + c sup g' (``Path.speed_limit``). A network only
approximates this field. This module measures how many of its velocities exceed the limit during sampling.
"""

import math

import torch
from torch import Tensor

from kac.sampling import generate
from kac.study.subject import Subject, Watched
from kac.util.errors import DivergedError

BINS = 80
TOP = 2.0
"""The histogram ends at this multiple of the limit. Its last bin includes all larger speeds."""


class Speeds:
    """A histogram of |u| over all coordinates.

    Args:
        limit: the speed limit.
    """

    def __init__(self, limit: float) -> None:
        if not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"`limit` is {limit}, but should be positive and finite.")
        self.limit, self.count, self.beyond, self.largest = limit, 0, 0, 0.0
        self.bins = torch.zeros(BINS, dtype=torch.int64)

    def see(self, u: Tensor) -> None:
        """Count velocities [batch, *sample].

        Raises:
            DivergedError: a velocity is not finite.
        """
        speed = u.detach().abs().flatten()
        largest = speed.max().item()
        if not math.isfinite(largest):
            raise DivergedError("The model has diverged: its velocities are NaN or infinite. Use another model.")
        bins = (speed * (BINS / (TOP * self.limit))).clamp(max=BINS - 1).long()
        self.bins += torch.bincount(bins, minlength=BINS).cpu()
        self.count += speed.numel()
        self.beyond += int((speed > self.limit).sum())
        self.largest = max(self.largest, largest)

    @property
    def share_beyond(self) -> float:
        """The fraction of all components that exceed the limit."""
        return self.beyond / self.count

    def density(self) -> tuple[list[float], list[float]]:
        """Return the edges [BINS + 1] of the histogram, and the density in each bin [BINS]."""
        width = TOP * self.limit / BINS
        return [i * width for i in range(BINS + 1)], (self.bins.double() / (self.count * width)).tolist()


def speeds(subject: Subject, limit: float) -> Speeds:
    """Sample the subject, and count the speeds of all velocities that its network computes."""
    counted = Speeds(limit)
    network = Watched(subject.network, lambda x, t, u: counted.see(u))
    for x_1, label in subject.starts():
        generate(network, x_1, label, subject.sampling)
    return counted
