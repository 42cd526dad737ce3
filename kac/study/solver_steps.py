"""Claim: a Kac flow needs few solver steps, because its velocities are bounded (arXiv 2509.21513).

This module measures the Frechet distance between delivered samples and the training images for each solver and number
of steps.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kac.metrics.distances import frechet_distance
from kac.metrics.features import FeatureSpace
from kac.metrics.statistics import Moments, Statistics
from kac.model import deliver
from kac.sampling import generate
from kac.solvers import SOLVERS, SolverName
from kac.study.subject import ClaimResult, Inputs, Subject, panels, png
from kac.util.images import delivered

STEPS = (5, 10, 20, 50, 100)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class SolverPoint(NamedTuple):
    """The quality of samples for one solver and one number of steps."""

    method: SolverName
    steps: int
    nfe: int
    distances: dict[str, float]  # Frechet distances by feature space


def quality_by_solver(
    subject: Subject, spaces: Sequence[FeatureSpace], train: dict[str, Moments], steps: Sequence[int] = STEPS
) -> Iterator[SolverPoint]:
    """Yield the quality for each combination of solver and number of steps, on the uniform grid.

    Args:
        train: the moments of the training images, by feature space.
    """
    for method in SOLVERS:
        for count in steps:
            sampling = subject.sampling._replace(solver=method, steps=count, knot_grid="uniform")
            distances, nfe = quality_of(replace(subject, sampling=sampling), spaces, train)
            yield SolverPoint(method, count, nfe, distances)


def quality_of(
    subject: Subject, spaces: Sequence[FeatureSpace], train: Mapping[str, Moments]
) -> tuple[dict[str, float], int]:
    """Return the Frechet distances of delivered samples by feature space, and the network evaluations per sample."""
    parts = []
    for x_1, label in subject.starts():
        solution = generate(subject.network, x_1, label, subject.sampling)
        parts.append(deliver(subject.config, solution.x))
    own = {space.name: Statistics.of(map(space, parts)).moments for space in spaces}
    return {name: frechet_distance(train[name], moments) for name, moments in own.items()}, solution.nfe


class TeacherQuality(NamedTuple):
    """The quality of the teacher's and the rivals' samples, and of held-out images."""

    found: dict[str, list[SolverPoint]]  # by model
    real: Tensor  # held-out images [rows, *sample], as many as samples if there are enough
    floor: dict[str, float]  # Frechet distances of the held-out images, by feature space


@functools.lru_cache(maxsize=1)
def quality_of_teachers(inputs: Inputs) -> TeacherQuality:
    """Sample the teacher and the rivals with every solver. Held-out images give the floor."""
    spaces, held_out, train = inputs.spaces, inputs.images.held_out, inputs.train
    count = min(inputs.samples, len(held_out))
    chosen = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:count]
    real = delivered(held_out.rows(chosen).images)
    floor = {s.name: frechet_distance(train[s.name], Statistics.of([s(real)]).moments) for s in spaces}
    found = {subject.name: list(quality_by_solver(subject, spaces, train)) for subject in inputs.teachers()}
    return TeacherQuality(found, real, floor)


def measure(inputs: Inputs) -> ClaimResult | str:
    """Compare the solvers. If there are several rivals, the text and picture include only the first Gaussian rival."""
    found, real, floor = quality_of_teachers(inputs)
    count, shown = len(real), inputs.spaces[-1].name
    gaussian = [rival.name for rival in inputs.rivals if rival.config.path.kind == "gaussian"]
    drawn = {name: found[name] for name in (found if len(found) <= 2 else ("teacher", *gaussian[:1]))}
    lines: list[str] = []
    metrics: dict[str, float] = {}
    for name, points in found.items():
        for method in SOLVERS if name in drawn else ():
            lines.append(" ".join([name, method, *(f"{p.distances[shown]:.4f}" for p in points if p.method == method)]))
        for point in points:
            key = f"{point.method}_{point.steps}/{name}"
            metrics |= {f"frechet_distance_{space}_{key}": value for space, value in point.distances.items()}
    lines.append(f"{count:,} held-out images {floor[shown]:.4f}")
    text = f"FD {shown} in {', '.join(map(str, STEPS))} steps: {'; '.join(lines)}"
    values = {name: [point._asdict() for point in points] for name, points in found.items()}
    held_out_values = {"count": count, "distances": floor}
    return ClaimResult(text, {"held_out": held_out_values, **values}, metrics, _plot(drawn, count, floor))


def _plot(found: Mapping[str, Sequence[SolverPoint]], count: int, floor: Mapping[str, float]) -> bytes:
    """Plot one panel per feature space, with the Frechet distance of ``count`` held-out images as the floor."""
    figure, axes = panels(1, len(floor))
    for axis, (space, distance) in zip(axes, floor.items(), strict=True):
        axis.axhline(distance, color="black", linewidth=0.8, label=f"real images ({count:,})")
        for line, (name, points) in zip(("-", "--"), found.items(), strict=False):
            for number, method in enumerate(SOLVERS):
                own = [(point.nfe, point.distances[space]) for point in points if point.method == method]
                style = f"{MARKERS[number]}{line}"
                axis.plot(*zip(*own, strict=True), style, color=f"C{number}", label=f"{name}, {method}")
        set_nfe_axes(axis, space, sorted({point.nfe for points in found.values() for point in points}))
        axis.legend(fontsize=8)
    figure.suptitle("Solvers: quality of delivered samples, w = 0")
    return png(figure)


def set_nfe_axes(axis: Any, space: str, nfe: Sequence[int]) -> None:
    """Label a plot of Frechet distances in a feature space against these numbers of network evaluations."""
    axis.set(xscale="log", yscale="log", xlabel="network evaluations (NFE) per sample", title=f"features: {space}")
    axis.set_xticks(nfe)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_ylabel("Frechet distance to training images")
