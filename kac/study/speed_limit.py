"""Claim: a Kac flow obeys a speed limit, and Gaussian flow matching has none (arXiv 2509.21513, 2506.20641).

For data in [-1, 1], no component of the true velocity at time t exceeds |f'(t)| + c g'(t) (``KacPath.speed_limit_at``),
so none exceeds the maximum over t (``Path.speed_limit``). A network only approximates the true velocity. This module
measures how many of the network's velocities exceed each limit.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kac.path import KacPath
from kac.sampling import generate
from kac.study.subject import ClaimResult, Inputs, Subject, Watched, panels, png
from kac.util.errors import DivergedError

BINS = 80
TOP = 2.0
"""The histogram ends at this multiple of the limit. Its last bin includes all larger speeds."""


MEASURED = ("largest", "share_beyond", "share_beyond_now")
"""The values of ``Speeds`` that the claim reports."""


class Speeds:
    """A histogram of |u| over all coordinates, around the speed limit of a path."""

    def __init__(self, path: KacPath) -> None:
        self.path, self.limit = path, path.speed_limit()
        self.count, self.beyond, self.beyond_now, self.largest = 0, 0, 0, 0.0
        self.bins = torch.zeros(BINS, dtype=torch.int64)

    def see(self, t: Tensor, u: Tensor) -> None:
        """Count velocities [batch, *sample] at the time ``t``, a scalar.

        Raises ``DivergedError`` if a velocity is not finite.
        """
        speed = u.detach().abs().flatten()
        largest = speed.max().item()
        if not math.isfinite(largest):
            raise DivergedError("The model has diverged: its velocities are NaN or infinite. Use another model.")
        bins = (speed * (BINS / (TOP * self.limit))).clamp(max=BINS - 1).long()
        self.bins += torch.bincount(bins, minlength=BINS).cpu()
        self.count += speed.numel()
        self.beyond += int((speed > self.limit).sum())
        self.beyond_now += int((speed > self.path.speed_limit_at(t.float())).sum())
        self.largest = max(self.largest, largest)

    @property
    def share_beyond(self) -> float:
        """The fraction of all components that exceed the limit."""
        return self.beyond / self.count

    @property
    def share_beyond_now(self) -> float:
        """The fraction of all components that exceed the limit at their time."""
        return self.beyond_now / self.count

    def density(self) -> tuple[list[float], list[float]]:
        """Return the edges [BINS + 1] of the histogram, and the density in each bin [BINS]."""
        width = TOP * self.limit / BINS
        return [i * width for i in range(BINS + 1)], (self.bins.double() / (self.count * width)).tolist()


def speeds(subject: Subject, path: KacPath) -> Speeds:
    """Sample the subject, and count the speeds of all velocities that its network computes."""
    counted = Speeds(path)
    network = Watched(subject.network, lambda x, t, u: counted.see(t, u))
    for x_1, label in subject.starts():
        generate(network, x_1, label, subject.sampling)
    return counted


def measure(inputs: Inputs) -> ClaimResult | str:
    """Measure the speeds of the teacher, its students without guidance, and the rivals."""
    path = inputs.teacher.config.path.build()
    if not isinstance(path, KacPath):
        return "the teacher's path has no speed limit"
    if inputs.teacher.config.data.autoencoder:
        return "the speed limit is for data in [-1, 1], not for latents"
    # Guided velocities have a different limit, so students that were distilled with guidance are not measured.
    teacher, *rivals = inputs.teachers()
    found = {s.name: speeds(s, path) for s in (teacher, *inputs.student_subjects(0.0), *rivals)}
    lines = [
        f"{name} at most {s.largest:.2f}, {100 * s.share_beyond:.2g} % beyond, {100 * s.share_beyond_now:.2g} % beyond "
        "the limit at their time"
        for name, s in found.items()
    ]
    values: dict[str, dict[str, Any]] = {
        name: {**{field: getattr(s, field) for field in MEASURED}, "density": s.density()[1]}
        for name, s in found.items()
    }
    metrics = {f"{field}/{name}": values[name][field] for field in MEASURED for name in found}
    limit = path.speed_limit()
    text = f"limit {limit:g} of the teacher's |u| per coordinate: {'; '.join(lines)}"
    return ClaimResult(text, {"limit": limit, "models": values}, metrics, _plot(found, limit))


def _plot(found: Mapping[str, Speeds], limit: float) -> bytes:
    figure, (axis,) = panels(1, 1, width=8)
    for name, measured in found.items():
        edges, heights = measured.density()
        # The last bin counts all larger speeds and would be a spike, so it is not drawn. The legend gives its share.
        label = f"{name}: {100 * measured.share_beyond:.2g} % beyond, at most {measured.largest:.2f}"
        axis.stairs(heights[:-1], edges[:-1], label=label, linewidth=1.4)
    axis.axvline(limit, color="black", linewidth=1, label=f"speed limit of the teacher's path, {limit:g}")
    axis.set(xlabel="|u| per coordinate", ylabel="density", yscale="log", title="Speeds during sampling, w = 0")
    axis.legend(fontsize=8)
    return png(figure)
