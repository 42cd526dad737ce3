"""Plots of a study, one per claim, as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kac.solvers import STEPPERS
from kac.study.guidance_scales import GuidancePoint
from kac.study.marginals import Marginal
from kac.study.memorisation import EnergyAndNearness
from kac.study.plane import EDGE, Travelled, density
from kac.study.solver_steps import SolverPoint
from kac.study.speed_limit import Speeds
from kac.study.stability import StabilityKnot

SHOWN_TRAJECTORIES = 60
"""Trajectories in the plot of the plane."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
TIME = "t, from noise (1) to data (0)"


def stability(found: Mapping[str, Sequence[StabilityKnot]]) -> bytes:
    """One panel per student: its error at each knot, and the bounds."""
    columns = max(2, min(4, len(found)))  # the title is wider than one panel
    rows = -(-len(found) // columns)
    figure, axes = _figure(rows, columns)
    for axis, (name, knots) in zip(axes, found.items(), strict=False):
        later = knots[1:]  # the error at the noise is 0, which has no logarithm
        t = [knot.t for knot in later]
        axis.plot(t, [knot.error for knot in later], "o-", color="C0", label="error e")
        axis.plot(t, [knot.bound for knot in later], "s--", color="C1", label="bound from the errors of single steps")
        axis.plot(t, [knot.one_step for knot in later], "^:", color="C2", label="bound from the previous knot")
        axis.plot(t, [knot.certain for knot in later], ":", color="grey", label="triangle inequality")
        axis.set(title=name, xlabel=TIME, ylabel="RMS distance per coordinate", yscale="log", xlim=(1.03, -0.03))
        axis.legend(fontsize=8)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    figure.suptitle("Stability: distance of a student to its teacher's trajectory, and its bound")
    return _png(figure)


def speed(found: Mapping[str, Speeds], limit: float) -> bytes:
    """The densities of the models' speeds, and the limit."""
    figure, (axis,) = _figure(1, 1, width=8)
    for name, measured in found.items():
        edges, heights = measured.density()
        # The last bin would be a spike, so it is left out. The legend has the share beyond the limit.
        label = f"{name}: {100 * measured.share_beyond:.2g} % beyond, at most {measured.largest:.2f}"
        axis.stairs(heights[:-1], edges[:-1], label=label, linewidth=1.4)
    axis.axvline(limit, color="black", linewidth=1, label=f"speed limit of the Kac path, {limit:g}")
    axis.set(xlabel="|u| per coordinate", ylabel="density", yscale="log", title="Speeds during sampling, w = 0")
    axis.legend(fontsize=8)
    return _png(figure)


def solver(found: Mapping[str, Sequence[SolverPoint]], count: int, floor: Mapping[str, float]) -> bytes:
    """One panel per feature space: Frechet distance against network evaluations.

    Args:
        count: the number of held-out images.
        floor: Frechet distance of the held-out images, by feature space.
    """
    figure, axes = _figure(1, len(floor))
    for axis, (space, distance) in zip(axes, floor.items(), strict=True):
        axis.axhline(distance, color="black", linewidth=0.8, label=f"real images ({count:,})")
        for line, (name, points) in zip(("-", "--"), found.items(), strict=False):
            for number, method in enumerate(STEPPERS):
                own = [(point.nfe, point.distances[space]) for point in points if point.method == method]
                style = f"{MARKERS[number]}{line}"
                axis.plot(*zip(*own, strict=True), style, color=f"C{number}", label=f"{name}, {method}")
        axis.set(xscale="log", yscale="log", xlabel="network evaluations (NFE) per sample", title=f"features: {space}")
        axis.set_xticks(sorted({point.nfe for points in found.values() for point in points}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.set_ylabel("Frechet distance to training images")
        axis.legend(fontsize=8)
    figure.suptitle("Solvers: quality of delivered samples, w = 0")
    return _png(figure)


def guidance(found: Sequence[GuidancePoint]) -> bytes:
    """One panel per measure, against the guidance scale."""
    panels: list[tuple[str, list[float]]] = [
        ("kinetic energy, mean", [point.kinetic_energy for point in found]),
        ("share of raw values beyond [-1, 1]", [point.out_of_range for point in found]),
    ]
    agreement = [point.agreement for point in found if point.agreement is not None]
    panels += [("label agreement", agreement)] if agreement else []
    figure, axes = _figure(1, len(panels))
    for axis, (label, values) in zip(axes, panels, strict=True):
        axis.plot([point.guidance for point in found], values, "o-")
        axis.set(xlabel="guidance scale w", ylabel=label)
        axis.grid(alpha=0.3)
    figure.suptitle("Guidance of the teacher")
    return _png(figure)


def memorisation(energy: Tensor, distance: Tensor, label: Tensor, found: EnergyAndNearness) -> bytes:
    """One dot per trajectory, coloured by class."""
    figure, (axis,) = _figure(1, 1, width=8)
    dots = axis.scatter(energy.numpy(), distance.numpy(), c=label.numpy(), cmap="tab10", s=8, alpha=0.6)
    figure.colorbar(dots, ax=axis, label="class")
    correlation = f"Spearman {found.correlation:+.3f}, within classes {found.within_classes:+.3f}"
    axis.set(xlabel="kinetic energy of the trajectory", ylabel="distance to the nearest training image")
    axis.set_title(f"Energy and near-copies: {correlation}")
    return _png(figure)


def marginals(found: Sequence[Marginal]) -> bytes:
    """The distance of the teacher's states to noised data, and its floor, against time."""
    figure, (axis,) = _figure(1, 1, width=8)
    t = [each.t for each in found]
    axis.plot(t, [each.distance for each in found], "o-", label="teacher's states to noised data")
    axis.plot(t, [each.floor for each in found], "s--", color="grey", label="floor: noised data to noised data")
    axis.set(xlabel=TIME, ylabel="squared sliced W2", yscale="log", xlim=(1.03, -0.03), title="Marginals of the flow")
    axis.legend()
    return _png(figure)


def plane(data: Tensor, found: Mapping[str, Travelled]) -> bytes:
    """One row per model: density of the data, density of the samples, some trajectories, speeds."""
    figure, axes = _figure(len(found), 4)
    highest = 1.05 * max(travelled.speed.max().item() for travelled in found.values())
    for row, (name, travelled) in enumerate(found.items()):
        real, samples, trajectories, speeds = axes[4 * row : 4 * row + 4]
        t, speed = travelled.t, travelled.speed
        _draw_density(real, data, "training data")
        _draw_density(samples, travelled.samples, f"{name}: samples")
        shown = travelled.x[:, :SHOWN_TRAJECTORIES]
        _draw_trajectories(trajectories, shown, f"{name}: {shown.shape[1]} trajectories")
        speeds.fill_between(t, speed.amin(1), speed.amax(1), alpha=0.2, label="slowest to fastest")
        speeds.plot(t, torch.quantile(speed, 0.99, dim=1), "--", label="99 %")
        speeds.plot(t, speed.mean(1), label="mean")
        speeds.set(xlabel=TIME, ylabel="speed |u|", title=f"{name}: speeds", xlim=(1.03, -0.03), ylim=(0, highest))
        speeds.legend(fontsize=8)
    return _png(figure)


def _draw_density(axis: Any, points: Tensor, title: str) -> None:
    axis.imshow(density(points), origin="lower", extent=(-EDGE, EDGE, -EDGE, EDGE), cmap="magma_r")
    axis.set(title=title, aspect="equal")


def _draw_trajectories(axis: Any, x: Tensor, title: str) -> None:
    axis.plot(x[..., 0], x[..., 1], color="C0", linewidth=0.6, alpha=0.6)
    axis.scatter(x[0, :, 0], x[0, :, 1], s=10, color="grey", label="noise", zorder=2)
    axis.scatter(x[-1, :, 0], x[-1, :, 1], s=10, color="C3", label="samples", zorder=3)
    axis.set(title=title, aspect="equal")
    axis.legend(fontsize=8)


def _figure(rows: int, columns: int, width: float = 5.5) -> tuple[Any, list[Any]]:
    """A figure and its panels, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 4.5 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()
