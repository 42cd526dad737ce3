"""Pictures: sheets of samples and the curve of quality against cost, as PNG bytes."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kac.metrics import Metric


def sheet(images: np.ndarray, columns: int = 10) -> bytes:
    """Images [count, *sample] in [-1, 1] as a grid, row by row."""
    rows = -(-len(images) // columns)
    figure, axes = _figure(rows, columns, scale=0.6)
    _fill(axes, [images[i * columns : (i + 1) * columns] for i in range(rows)])
    return _png(figure)


def comparison(rows: Sequence[tuple[str, np.ndarray]]) -> bytes:
    """One titled row of images a model, the same noise in each column."""
    figure, axes = _figure(len(rows), len(rows[0][1]), scale=0.6, margin=2.4)
    _fill(axes, [images for _, images in rows])
    for axis, (title, _) in zip(axes[:, 0], rows, strict=True):
        axis.text(-0.2, 0.5, title, transform=axis.transAxes, ha="right", va="center", fontsize=9)
    return _png(figure)


class Point(NamedTuple):
    """A model in a curve of quality against cost."""

    kind: str
    guidance: float
    nfe: float
    value: float


def quality_by_nfe(metric: Metric, points: Sequence[Point]) -> bytes:
    """A metric against network evaluations, one point a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.add_subplot()
    for number, w in enumerate(sorted({point.guidance for point in points})):
        here = sorted((p.kind, p.nfe, p.value) for p in points if p.guidance == w)
        students = [(nfe, value) for kind, nfe, value in here if kind == "student"]
        colour = f"C{number}"
        if students:
            axis.plot(*zip(*students, strict=True), "o-", color=colour, label=f"students, w = {w:g}")
        for nfe, value in [(nfe, value) for kind, nfe, value in here if kind == "teacher"]:
            axis.plot([nfe], [value], "*", markersize=12, color=colour, label=f"teacher, w = {w:g}")
            axis.axhline(value, color=colour, linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="network evaluations (NFE) an image", ylabel=metric.meaning)
    axis.set_ylim(0, 1.1 * max(point.value for point in points))
    axis.set_xticks(sorted({point.nfe for point in points}))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.legend()
    return _png(figure)


def _figure(rows: int, columns: int, scale: float, margin: float = 0.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * scale + margin, rows * scale))
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=margin / (columns * scale + margin), right=1, top=1, bottom=0, wspace=0.05, hspace=0.05)
    return figure, axes


def _fill(axes: Any, rows: Sequence[np.ndarray]) -> None:
    for axis in axes.flat:
        axis.axis("off")
    for row, images in zip(axes, rows, strict=True):
        for axis, image in zip(row, images, strict=False):
            _draw(axis, image)


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
