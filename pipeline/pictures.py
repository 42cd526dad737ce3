"""Pictures: sheets of samples and the curve of quality against cost, as PNG bytes."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from kac.metrics import Metric


def sheet(images: np.ndarray, columns: int = 10) -> bytes:
    """Images [count, *sample] in [-1, 1] as a grid, row by row."""
    return comparison([("", images[i : i + columns]) for i in range(0, len(images), columns)], margin=0.0)


def comparison(rows: Sequence[tuple[str, np.ndarray]], margin: float = 2.4) -> bytes:
    """One titled row of images a model, the same noise in each column; the titles are in a margin of so many inches."""
    figure, axes = _figure(len(rows), max(len(images) for _, images in rows), scale=0.6, margin=margin)
    for axis in axes.flat:
        axis.axis("off")
    for row, (title, images) in zip(axes, rows, strict=True):
        row[0].text(-0.2, 0.5, title, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
        for axis, image in zip(row, images, strict=False):
            _draw(axis, image)
    return _png(figure)


def quality_by_nfe(panels: Sequence[tuple[Metric, Sequence[tuple[str, float, float, float]]]]) -> bytes:
    """Metrics against network evaluations, one panel each: a (kind, guidance, nfe, value) for every model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axis, (metric, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_curve(axis, points)
        axis.set(ylabel=metric.heading, title=metric.meaning)
        axis.title.set_size(8)
        if metric.better == "lower":
            axis.set_ylim(0, 1.1 * max(point[3] for point in points))
    return _png(figure)


def _draw_curve(axis: Any, points: Sequence[tuple[str, float, float, float]]) -> None:
    for number, w in enumerate(sorted({point[1] for point in points})):
        here = sorted((kind, nfe, value) for kind, scale, nfe, value in points if scale == w)
        students = [(nfe, value) for kind, nfe, value in here if kind == "student"]
        colour = f"C{number}"
        if students:
            axis.plot(*zip(*students, strict=True), "o-", color=colour, label=f"students, w = {w:g}")
        for nfe, value in [(nfe, value) for kind, nfe, value in here if kind == "teacher"]:
            axis.plot([nfe], [value], "*", markersize=12, color=colour, label=f"teacher, w = {w:g}")
            axis.axhline(value, color=colour, linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="network evaluations (NFE) per image")
    axis.set_xticks(sorted({point[2] for point in points}))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.legend()


def _figure(rows: int, columns: int, scale: float, margin: float = 0.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * scale + margin, rows * scale))
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=margin / (columns * scale + margin), right=1, top=1, bottom=0, wspace=0.05, hspace=0.05)
    return figure, axes


def _draw(axis: Any, image: np.ndarray) -> None:
    if image.ndim == 1:  # a point of the plane
        axis.plot(image[:1], image[1:2], ".", color="black")
        axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
        return
    pixels = np.clip((image + 1) / 2, 0, 1)
    if pixels.shape[0] == 3:
        axis.imshow(np.moveaxis(pixels, 0, -1), interpolation="nearest")
    else:
        axis.imshow(pixels[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=120)
    return sink.getvalue()
