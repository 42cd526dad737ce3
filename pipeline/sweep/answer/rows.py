"""The rows of a sweep's answer: every trial with what was measured of its student, and which of them are the best.

A student of any steps or of all scales has a row for each step count and scale at which it was judged.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kac.metrics import Metric
from pipeline import tracking
from pipeline.evaluate.scores import Record, Score, columns

COST, SPEED = "nfe", "images_per_second"
"""What quality is set against."""


class Trial(Protocol):
    """A trial as the sweep's ledger has it."""

    @property
    def number(self) -> int:
        """Its place in the sweep."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def out(self) -> str:
        """The folder of its student."""

    @property
    def values(self) -> Mapping[str, Any]:
        """What was varied, by dotted names of the spec's fields."""

    @property
    def status(self) -> str:
        """waiting, running, finished, stopped (early) or failed."""

    @property
    def updates(self) -> int:
        """Updates that are done."""

    @property
    def seconds(self) -> float:
        """Of training."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """What it reported last."""

    @property
    def error(self) -> str:
        """Why it failed."""


@dataclass(frozen=True)
class Row:
    """A trial, or one of the ways in which its student was judged."""

    trial: Trial
    score: Score | None = None
    place: int | None = None  # of the score in its evaluation
    metrics: Mapping[str, float] = field(default_factory=dict)  # reported and judged

    @property
    def name(self) -> str:
        """As in the evaluation's table."""
        return self.score.name if self.score else self.trial.name

    @property
    def steps(self) -> Any:
        """Macro steps; None where neither the evaluation nor the trial says."""
        return self.score.steps if self.score else self.trial.values.get("steps")

    @property
    def guidance(self) -> Any:
        """Guidance scale, or "all"; None where neither the evaluation nor the trial says."""
        return self.score.guidance if self.score else self.trial.values.get("guidance")

    @property
    def cost(self) -> float | None:
        """Network evaluations an image."""
        found: float | None = self.metrics.get(COST, self.steps)
        return found


def make_rows(trials: Sequence[Trial], record: Record | None) -> list[Row]:
    """All trials in their order, a row a trial or more."""
    rows = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        reported = {name: value for name, value in trial.metrics.items() if math.isfinite(value)}
        scores = [(place, s) for place, s in enumerate(record.scores if record else ()) if s.folder == trial.out]
        rows += [Row(trial, score, place, {**reported, **score.metrics}) for place, score in scores] or [
            Row(trial, metrics=reported)
        ]
    return rows


def ranked(rows: Iterable[Row], metric: Metric) -> list[Row]:
    """The rows of finished trials that have the metric, the best first; of equals the cheaper one."""
    sign = -1 if metric.better == "higher" else 1
    found = [row for row in rows if row.trial.status == "finished" and metric.name in row.metrics]
    return sorted(found, key=lambda row: (sign * row.metrics[metric.name], row.cost or 0, row.trial.number))


SAME_SPEED = 1.1
"""Speeds within this factor count as equal: they are measured, and differ by as much from one time to the next."""


def front(rows: Iterable[Row], metric: Metric, cost: Metric) -> list[Row]:
    """The rows than which none is better at no higher cost, the cheapest first; of equals the first one."""
    places = [(value, row) for row in ranked(rows, metric) if (value := cost_of(row, cost)) is not None]
    if cost.better == "higher":
        found = [(v, row) for n, (v, row) in enumerate(places) if all(v > SAME_SPEED * w for w, _ in places[:n])]
        return [row for _, row in sorted(found, key=lambda place: -place[0])]
    # Of the same quality the cheaper one stands before, so that whatever beats a row does.
    return [row for n, (v, row) in enumerate(places) if all(v < w for w, _ in places[:n])][::-1]


def cost_of(row: Row, cost: Metric) -> float | None:
    """What an image of the row costs; without an evaluation that is known of network evaluations alone."""
    return row.cost if cost.name == COST else row.metrics.get(cost.name)


def describe(name: str, record: Record | None, better: str = "") -> Metric:
    """The metric of this name, with a heading; prefixes (``validation/``) become part of it."""
    known = (record.metrics() if record else {}).get(name) or tracking.declared(name)
    plain = name.replace("/", " ").replace("_", " ")
    found: Metric = known or Metric(name, plain)
    heading = found.heading if "/" not in name and found.heading else plain
    direction: Any = better or found.better
    return dataclasses.replace(found, name=name, heading=heading, better=direction)


def shown_metrics(rows: Sequence[Row], record: Record | None, metric: Metric) -> list[Metric]:
    """The metrics that have a column: the sweep's own, those of the evaluation's table, and those of the validation."""
    reported = sorted({name for row in rows for name in row.trial.metrics if name.startswith("validation/")})
    judged = [m.name for m in columns(record)] if record else []
    first = [] if metric.name in judged else [metric.name]  # columns of one feature space stand together
    names = [name for name in dict.fromkeys([*first, *judged, *reported]) if any(name in r.metrics for r in rows)]
    return [metric if name == metric.name else describe(name, record) for name in names]


def varied(rows: Sequence[Row]) -> list[str]:
    """The fields that differ between trials, in the order of the sweep."""
    names = dict.fromkeys(name for row in rows for name in row.trial.values)
    return [name for name in names if len({str(row.trial.values.get(name)) for row in rows}) > 1]


def headings(fields: Sequence[str]) -> dict[str, str]:
    """What varied fields are called: by the last part of their name, or by all of it where that is another's too."""
    short = {field: (field.removesuffix(".kind").rsplit(".", 1)[-1]).replace("_", " ") for field in fields}
    counts = Counter(short.values())
    return {field: title if counts[title] == 1 else field for field, title in short.items()}


def scale(value: Any) -> tuple[bool, float, str]:
    """By which values of a field are ordered: numbers first."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (not is_number, float(value) if is_number else 0.0, str(value))


def text(value: Any) -> str:
    """A varied value in a table."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
