"""Claim: for mixtures in the plane, a Kac flow has bounded speed and a Gaussian flow does not (arXiv 2506.20641).

For samples that are points, this module records their trajectories, endpoints and speeds.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kac.metrics.distances import sliced_wasserstein
from kac.sampling import generate
from kac.study.subject import TIME, ClaimResult, Inputs, Subject, Watched, panels, png

EDGE, CELLS = 1.25, 100
"""Densities are counts of points on a grid from -EDGE to EDGE, with CELLS cells per side."""

SHOWN_TRAJECTORIES = 60


class Travelled(NamedTuple):
    """The positions and speeds of a flow's points at each network evaluation."""

    t: Tensor  # [evaluations]
    x: Tensor  # [evaluations + 1, points, 2]; the last entry holds the samples
    speed: Tensor  # [evaluations, points], the length |u| of the velocity


def travel(subject: Subject) -> Travelled:
    """Follow all points of a subject that has no guidance and whose solver evaluates the network once per step."""
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
    """Return the number of points [points, 2] in each cell, as [CELLS, CELLS] with the bottom row first."""
    edges = np.linspace(-EDGE, EDGE, CELLS + 1)
    counts: np.ndarray = np.histogram2d(points[:, 1].numpy(), points[:, 0].numpy(), bins=(edges, edges))[0]
    return counts


def measure(inputs: Inputs) -> ClaimResult | str:
    """Follow the points of the teacher and the rivals."""
    if inputs.teacher.config.sample_shape != (2,):
        return "the samples are not points of the plane"
    # AB-2 evaluates the network once per step, so every evaluated state is on the trajectory.
    subjects = [replace(subject, sampling=subject.sampling._replace(solver="ab2")) for subject in inputs.teachers()]
    found = {subject.name: travel(subject) for subject in subjects}
    train = torch.cat(list(inputs.pixels.of_training_images(inputs.images)))
    lines, values = [], {}
    metrics: dict[str, float] = {}
    for name, (t, x, speed) in found.items():
        mean, largest = speed.mean(1), speed.amax(1)
        distance, fastest = sliced_wasserstein(train, x[-1]), largest.max().item()
        measured = {"sliced_wasserstein": distance, "fastest": fastest}
        values[name] = {**measured, "t": t.tolist(), "mean": mean.tolist(), "largest": largest.tolist()}
        metrics |= {f"{measure}/{name}": value for measure, value in measured.items()}
        lines.append(f"{name}: squared sliced W2 {distance:.5f}, fastest {fastest:.2f}")
    return ClaimResult("; ".join(lines), values, metrics, _plot(train, found))


def _plot(data: Tensor, found: Mapping[str, Travelled]) -> bytes:
    """Plot one row per model: density of the data, density of the samples, some trajectories, and speeds."""
    figure, axes = panels(len(found), 4)
    highest = 1.05 * max(travelled.speed.max().item() for travelled in found.values())
    for row, (name, (t, x, speed)) in enumerate(found.items()):
        real, samples, trajectories, speeds = axes[4 * row : 4 * row + 4]
        _draw_density(real, data, "training data")
        _draw_density(samples, x[-1], f"{name}: samples")
        shown = x[:, :SHOWN_TRAJECTORIES]
        trajectories.plot(shown[..., 0], shown[..., 1], color="C0", linewidth=0.6, alpha=0.6)
        trajectories.scatter(*shown[0].T, s=10, color="grey", label="noise", zorder=2)
        trajectories.scatter(*shown[-1].T, s=10, color="C3", label="samples", zorder=3)
        trajectories.set(title=f"{name}: {shown.shape[1]} trajectories", aspect="equal")
        trajectories.legend(fontsize=8)
        speeds.fill_between(t, speed.amin(1), speed.amax(1), alpha=0.2, label="slowest to fastest")
        speeds.plot(t, torch.quantile(speed, 0.99, dim=1), "--", label="99 %")
        speeds.plot(t, speed.mean(1), label="mean")
        speeds.set(ylabel="speed |u|", title=f"{name}: speeds", ylim=(0, highest), **TIME)
        speeds.legend(fontsize=8)
    return png(figure)


def _draw_density(axis: Any, points: Tensor, title: str) -> None:
    axis.imshow(density(points), origin="lower", extent=(-EDGE, EDGE, -EDGE, EDGE), cmap="magma_r")
    axis.set(title=title, aspect="equal")
