"""The result of a claim, and the figure of its picture."""

import io
from dataclasses import dataclass, field
from typing import Any

TIME = {"xlabel": "t, from noise (1) to data (0)", "xlim": (1.03, -0.03)}
"""Settings of a time axis."""


@dataclass(frozen=True)
class ClaimResult:
    """The measurements of a claim."""

    text: str  # one line
    values: dict[str, Any]  # as JSON; by model if there are several
    metrics: dict[str, float]  # named MEASURE/MODEL or MEASURE
    picture: bytes = field(repr=False)  # PNG


def panels(rows: int, columns: int, width: float = 5.5) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 4.5 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def png(figure: Any) -> bytes:
    """Return the figure as PNG."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()
