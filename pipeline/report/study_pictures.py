"""Pictures of a study, one a claim, as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kac.study.guidance_scales import GuidancePoint
from kac.study.marginals import Marginal
from kac.study.memorisation import EnergyAndNearness
from kac.study.plane import EDGE, Travelled, density
from kac.study.solver_steps import METHODS, SolverPoint
from kac.study.speed_limit import Speeds
from kac.study.stability import StabilityKnot

SHOWN_WAYS = 60
"""Trajectories that are drawn in the plane."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
TIME = "t, from noise (1) to data (0)"


def stability(found: Mapping[str, Sequence[StabilityKnot]]) -> bytes:
    """A panel a student: its error at each knot, below the bounds."""
    columns = max(2, min(4, len(found)))  # the title is wider than one panel
    rows = -(-len(found) // columns)
    figure, axes = _figure(rows, columns)
    for axis, (name, knots) in zip(axes, found.items(), strict=False):
        later = knots[1:]  # at the noise there is no error, and a logarithm of it neither
        t = [knot.t for knot in later]
        axis.plot(t, [knot.error for knot in later], "o-", color="C0", label="error e")
        axis.plot(t, [knot.bound for knot in later], "s--", color="C1", label="bound, from errors of single steps")
        axis.plot(t, [knot.one_step for knot in later], "^:", color="C2", label="bound from the knot before")
        axis.plot(t, [knot.certain for knot in later], ":", color="grey", label="triangle inequality")
        axis.set(title=name, xlabel=TIME, ylabel="RMS distance per coordinate", yscale="log", xlim=(1.03, -0.03))
        axis.legend(fontsize=8)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    figure.suptitle("Stability: a student's distance to its teacher's trajectory, and its bound")
    return _png(figure)


def speed(found: Mapping[str, Speeds], limit: float) -> bytes:
    """The densities of speeds over each other, with the limit."""
    figure, (axis,) = _figure(1, 1, width=8)
    for name, met in found.items():
        edges, heights = met.density()
        # Of what is beyond the last edge one bin would be a spike: the legend tells how much is beyond the limit.
        label = f"{name}: {100 * met.share_beyond:.2g} % beyond, at most {met.largest:.2f}"
        axis.stairs(heights[:-1], edges[:-1], label=label, linewidth=1.4)
    axis.axvline(limit, color="black", linewidth=1, label=f"speed limit of the Kac path, {limit:g}")
    axis.set(xlabel="|u| per coordinate", ylabel="density", yscale="log", title="Speeds met while sampling, w = 0")
    axis.legend(fontsize=8)
    return _png(figure)


def solver(found: Mapping[str, Sequence[SolverPoint]], count: int, floor: Mapping[str, float]) -> bytes:
    """A panel a feature space: quality against network evaluations, with that of ``count`` held-out images."""
    figure, axes = _figure(1, len(floor))
    for axis, (space, distance) in zip(axes, floor.items(), strict=True):
        axis.axhline(distance, color="black", linewidth=0.8, label=f"real images ({count:,})")
        for line, (name, points) in zip(("-", "--"), found.items(), strict=False):
            for number, method in enumerate(METHODS):
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
    """A panel a measure, against the scale."""
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
    """A dot a trajectory, coloured by class."""
    figure, (axis,) = _figure(1, 1, width=8)
    dots = axis.scatter(energy.numpy(), distance.numpy(), c=label.numpy(), cmap="tab10", s=8, alpha=0.6)
    figure.colorbar(dots, ax=axis, label="class")
    correlation = f"Spearman {found.correlation:+.3f}, within classes {found.within_classes:+.3f}"
    axis.set(xlabel="kinetic energy of the trajectory", ylabel="distance to the nearest training image")
    axis.set_title(f"Energy and near-copies: {correlation}")
    return _png(figure)


def marginals(found: Sequence[Marginal]) -> bytes:
    """Distance and floor against time."""
    figure, (axis,) = _figure(1, 1, width=8)
    t = [each.t for each in found]
    axis.plot(t, [each.distance for each in found], "o-", label="the teacher's states to noised data")
    axis.plot(t, [each.floor for each in found], "s--", color="grey", label="floor: noised data to noised data")
    axis.set(xlabel=TIME, ylabel="squared sliced W2", yscale="log", xlim=(1.03, -0.03), title="Marginals of the flow")
    axis.legend()
    return _png(figure)


def plane(data: Tensor, found: Mapping[str, Travelled]) -> bytes:
    """A row a flow: density of data, density of samples, some of the ways, speeds along all ways."""
    figure, axes = _figure(len(found), 4)
    highest = 1.05 * max(way.speed.max().item() for way in found.values())
    for row, (name, way) in enumerate(found.items()):
        real, made, ways, speeds = axes[4 * row : 4 * row + 4]
        _draw_density(real, data, "training data")
        _draw_density(made, way.samples, f"{name}: samples")
        _draw_ways(ways, way, f"{name}: {min(SHOWN_WAYS, way.x.shape[1])} trajectories")
        speeds.fill_between(way.t, way.speed.amin(1), way.speed.amax(1), alpha=0.2, label="slowest to fastest")
        speeds.plot(way.t, torch.quantile(way.speed, 0.99, dim=1), "--", label="99 %")
        speeds.plot(way.t, way.speed.mean(1), label="mean")
        speeds.set(xlabel=TIME, ylabel="speed |u|", title=f"{name}: speeds", xlim=(1.03, -0.03), ylim=(0, highest))
        speeds.legend(fontsize=8)
    return _png(figure)


def _draw_density(axis: Any, points: Tensor, title: str) -> None:
    axis.imshow(density(points), origin="lower", extent=(-EDGE, EDGE, -EDGE, EDGE), cmap="magma_r")
    axis.set(title=title, aspect="equal")


def _draw_ways(axis: Any, way: Travelled, title: str) -> None:
    shown = way.x[:, :SHOWN_WAYS]
    axis.plot(shown[..., 0], shown[..., 1], color="C0", linewidth=0.6, alpha=0.6)
    axis.scatter(shown[0, :, 0], shown[0, :, 1], s=10, color="grey", label="noise", zorder=2)
    axis.scatter(shown[-1, :, 0], shown[-1, :, 1], s=10, color="C3", label="samples", zorder=3)
    axis.set(title=title, aspect="equal")
    axis.legend(fontsize=8)


def _figure(rows: int, columns: int, width: float = 5.5) -> tuple[Any, list[Any]]:
    """A figure, and its panels row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 4.5 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()
