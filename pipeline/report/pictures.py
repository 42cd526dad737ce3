"""Sheets of samples, and plots of quality against cost, as PNG bytes."""

import io
import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kac.metrics import Metric
from kac.util.images import to_bytes

if TYPE_CHECKING:
    from pipeline.evaluate.scores import Score

CELL, GAP, FONT_SIZE = 64, 3, 14
"""Width of enlarged images, gap between images, and height of titles, in pixels."""


def sheet(images: np.ndarray, columns: int = 10) -> bytes:
    """A grid of delivered samples [count, *sample], row by row."""
    return _png(_grid([images[i : i + columns] for i in range(0, len(images), columns)]))


def comparison(rows: Sequence[tuple[str, np.ndarray]]) -> bytes:
    """One titled row of delivered samples [count, *sample] per model, with the same noise in each column."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    margin = 2 * FONT_SIZE + int(max(font.getlength(title) for title, _ in rows))
    grid = Image.fromarray(_grid([images for _, images in rows]))
    page = Image.new("RGB", (margin + grid.width, grid.height), "white")
    page.paste(grid, (margin, 0))
    pen, height = ImageDraw.Draw(page), grid.height / len(rows)
    for row, (title, _) in enumerate(rows):
        pen.text((margin - FONT_SIZE, (row + 0.5) * height), title, fill="black", font=font, anchor="rm")
    return _png(np.asarray(page))


TITLE_WIDTH = 80
"""Characters per line of a panel's title."""

MARKERS, LINES = "osv^D", ("-", "--", "-.")
"""Styles that distinguish the curves of one guidance scale, which have the same colour."""


def quality_by_nfe(metrics: Sequence[Metric], scores: Sequence["Score"]) -> bytes:
    """Plot each metric against network evaluations.

    Args:
        metrics: the metrics to plot, one per panel. Every model must have all of these metrics.
        scores: the score of real images, then the models' scores.
    """
    from matplotlib.figure import Figure

    real, models = scores[0], [score for score in scores if "nfe" in score.metrics]
    figure = Figure(figsize=(6 * len(metrics), 4), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        if metric.name in real.metrics:
            label = f"real images ({real.count:,})"
            axis.axhline(real.metrics[metric.name], color="black", linewidth=0.8, label=label)
        _draw_curves(axis, metric.name, models)
        axis.set(ylabel=metric.heading, title=textwrap.fill(metric.meaning, TITLE_WIDTH))
        axis.title.set_size(8)
        if metric.better == "lower":
            shown = [score.metrics[metric.name] for score in (real, *models) if metric.name in score.metrics]
            axis.set_ylim(0, 1.1 * max(shown))
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=120)
    return sink.getvalue()


def _draw_curves(axis: Any, metric: str, models: Sequence["Score"]) -> None:
    """For each guidance scale, draw one line per any-step student and one for all other students, in one colour."""
    curves = sorted({score.any_step or "students" for score in models if score.kind == "student"})
    for number, w in enumerate(sorted({score.guidance or 0.0 for score in models})):
        colour, own = f"C{number}", [score for score in models if score.guidance == w]
        for curve, marker, line in zip(curves, itertools.cycle(MARKERS), itertools.cycle(LINES), strict=False):
            students = [score for score in own if score.kind == "student" and (score.any_step or "students") == curve]
            points = sorted((score.metrics["nfe"], score.metrics[metric]) for score in students)
            if points:
                name = curve.replace("$", r"\$")  # matplotlib would read formulas between dollar signs
                axis.plot(*zip(*points, strict=True), line, marker=marker, color=colour, label=f"{name}, w = {w:g}")
        for teacher in (score for score in own if score.kind == "teacher"):
            nfe, value = teacher.metrics["nfe"], teacher.metrics[metric]
            axis.plot([nfe], [value], "*", markersize=12, color=colour, label=f"teacher, w = {w:g}")
            axis.axhline(value, color=colour, linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="network evaluations (NFE) per image")
    axis.set_xticks(sorted({score.metrics["nfe"] for score in models}))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.legend()


def _grid(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of samples as one picture [height, width, 3], uint8; small images are enlarged by an integer factor."""
    cells = [[_cell(sample) for sample in row] for row in rows]
    height, width = cells[0][0].shape[:2]
    factor, columns = max(1, CELL // width), max(map(len, cells))
    picture = np.full((len(cells), columns, height * factor + GAP, width * factor + GAP, 3), 255, np.uint8)
    for picture_row, row in zip(picture, cells, strict=True):
        for area, image in zip(picture_row, row, strict=False):
            area[: height * factor, : width * factor] = image.repeat(factor, 0).repeat(factor, 1)
    return picture.swapaxes(1, 2).reshape(len(cells) * (height * factor + GAP), -1, 3)


def _cell(sample: np.ndarray) -> np.ndarray:
    """A sample as an image [height, width, 3], uint8. A point becomes a dot in the square from -1.2 to 1.2."""
    if sample.ndim == 3:
        pixels = to_bytes(torch.from_numpy(sample[None]))[0].numpy()
        colours = pixels if len(pixels) == 3 else pixels[:1]
        return np.moveaxis(np.broadcast_to(colours, (3, *colours.shape[1:])), 0, -1)
    board = np.full((CELL, CELL, 3), 255, np.uint8)
    x, y = (np.clip(sample[:2] / 2.4 + 0.5, 0, 1) * (CELL - 4)).astype(int)
    board[CELL - 4 - y : CELL - y, x : x + 4] = 0
    return board


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="png")
    return sink.getvalue()
