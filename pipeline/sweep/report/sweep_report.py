"""The results of a sweep: every trial with its metrics, their ranking, and the front of quality against cost.

An any-step student, or a student of all guidance scales, has one row per evaluated step count and scale.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kac.metrics import Metric
from pipeline import tracking
from pipeline.evaluate.scores import Record, Score, columns
from pipeline.sweep.ledger import TrialRecord

COST, SPEED = "nfe", "images_per_second"
"""The metrics that measure cost: network evaluations per image, and images per second."""

SAME_SPEED = 1.1
"""Speeds within this factor count as equal, because repeated measurements differ by as much."""


@dataclass(frozen=True)
class Row:
    """A trial, with one score of its student if there is any."""

    trial: TrialRecord
    score: Score | None = None
    score_index: int | None = None  # in the evaluation
    metrics: Mapping[str, float] = field(default_factory=dict)  # from training and from the evaluation

    @property
    def name(self) -> str:
        """The name in the evaluation's table; without an evaluation, the name of the trial."""
        return self.score.name if self.score else self.trial.name

    @property
    def steps(self) -> Any:
        """Student steps; None if unknown."""
        return self.score.steps if self.score else self.trial.values.get("steps")

    @property
    def guidance(self) -> Any:
        """Guidance scale or "all"; None if unknown."""
        return self.score.guidance if self.score else self.trial.values.get("guidance")

    @property
    def cost(self) -> float | None:
        """Network evaluations per image."""
        nfe: float | None = self.metrics.get(COST, self.steps)
        return nfe


@dataclass(frozen=True)
class SweepReport:
    """The results of a sweep."""

    rows: Sequence[Row]  # in the order of the sweep
    metric: Metric  # ranks the rows
    record: Record | None  # the evaluation

    @classmethod
    def of(cls, trials: Sequence[TrialRecord], record: Record | None, metric: str, better: str) -> "SweepReport":
        """The results from the trials and the evaluation of their students."""
        return cls(make_rows(trials, record), describe(metric, record, better), record)

    @cached_property
    def ranked(self) -> list[Row]:
        """The rows of finished trials that have the metric, best first."""
        return ranked(self.rows, self.metric)

    @property
    def best(self) -> Row | None:
        """The best row, if there is any."""
        return self.ranked[0] if self.ranked else None

    @cached_property
    def by_cost(self) -> list[Row]:
        """The front against network evaluations, cheapest first."""
        return front(self.rows, self.metric, describe(COST, self.record, "lower"))

    @cached_property
    def by_speed(self) -> list[Row]:
        """The front against images per second, fastest first."""
        return front(self.rows, self.metric, describe(SPEED, self.record, "higher"))

    @cached_property
    def on_front(self) -> list[Row]:
        """The rows of both fronts, cheapest first."""
        rows = [*self.by_cost, *(row for row in self.by_speed if row not in self.by_cost)]
        return sorted(rows, key=lambda row: (row.cost or 0, row.trial.number))

    @cached_property
    def fields(self) -> list[str]:
        """The fields that differ between trials, in the order of the sweep."""
        names = dict.fromkeys(name for row in self.rows for name in row.trial.values)
        return [name for name in names if len({str(row.trial.values.get(name)) for row in self.rows}) > 1]

    @cached_property
    def columns(self) -> list[Metric]:
        """The metrics with a column: the ranking metric, those of the evaluation's table, and validation metrics."""
        reported = sorted({name for row in self.rows for name in row.trial.metrics if name.startswith("validation/")})
        evaluated = [metric.name for metric in columns(self.record)] if self.record else []
        first = [] if self.metric.name in evaluated else [self.metric.name]  # keeps a feature space's columns together
        names = dict.fromkeys([*first, *evaluated, *reported])
        return [
            self.metric if name == self.metric.name else describe(name, self.record)
            for name in names
            if any(name in row.metrics for row in self.rows)
        ]

    @cached_property
    def main_columns(self) -> list[Metric]:
        """The columns that fit a terminal: the ranking metric, its ratio to the teacher, label agreement and costs."""
        ratio = self.metric.name.replace("frechet_distance", "frechet_ratio")
        wanted = {self.metric.name, ratio, "label_agreement", COST, SPEED}
        return [metric for metric in self.columns if metric.name in wanted]

    def marks(self, row: Row) -> str:
        """The names of the fronts that contain the row."""
        fronts = {"NFE": self.by_cost, "speed": self.by_speed}
        return ", ".join(name for name, rows in fronts.items() if row in rows)


def make_rows(trials: Sequence[TrialRecord], record: Record | None) -> list[Row]:
    """One or more rows per trial, in the order of the sweep."""
    rows = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        reported = {name: value for name, value in trial.metrics.items() if math.isfinite(value)}
        scores = [(index, s) for index, s in enumerate(record.scores if record else ()) if s.folder == trial.out]
        rows += [Row(trial, score, index, {**reported, **score.metrics}) for index, score in scores] or [
            Row(trial, metrics=reported)
        ]
    return rows


def ranked(rows: Iterable[Row], metric: Metric) -> list[Row]:
    """The rows of finished trials that have the metric, best first. Ties are broken by cost."""
    sign = -1 if metric.better == "higher" else 1
    finished = [row for row in rows if row.trial.status == "finished" and metric.name in row.metrics]
    return sorted(finished, key=lambda row: (sign * row.metrics[metric.name], row.cost or 0, row.trial.number))


def front(rows: Iterable[Row], metric: Metric, cost: Metric) -> list[Row]:
    """The Pareto front, cheapest first: rows that no row of the same or lower cost beats. One of several equal rows."""

    def is_cheaper(value: float, other: float) -> bool:
        return value > SAME_SPEED * other if cost.better == "higher" else value < other

    costs = [(value, row) for row in ranked(rows, metric) if (value := cost_of(row, cost)) is not None]
    # `ranked` puts the cheaper of two equal rows first, so only earlier rows can beat a row.
    return [row for n, (v, row) in enumerate(costs) if all(is_cheaper(v, w) for w, _ in costs[:n])][::-1]


def cost_of(row: Row, cost: Metric) -> float | None:
    """The cost per image of a row. Without an evaluation only network evaluations are known."""
    return row.cost if cost.name == COST else row.metrics.get(cost.name)


def describe(name: str, record: Record | None, better: str = "") -> Metric:
    """The metric of this name, with a heading that includes prefixes such as ``validation/``."""
    known = (record.metrics() if record else {}).get(name) or tracking.declared(name)
    plain = name.replace("/", " ").replace("_", " ")
    metric: Metric = known or Metric(name, plain)
    heading = metric.heading if "/" not in name and metric.heading else plain
    direction: Any = better or metric.better
    return dataclasses.replace(metric, name=name, heading=heading, better=direction)


def headings(fields: Sequence[str]) -> dict[str, str]:
    """Headings by field: the last part of the dotted name, or the whole name if two fields share the last part."""
    short = {field: (field.removesuffix(".kind").rsplit(".", 1)[-1]).replace("_", " ") for field in fields}
    counts = Counter(short.values())
    return {field: title if counts[title] == 1 else field for field, title in short.items()}


def sort_key(value: Any) -> tuple[bool, float, str]:
    """Sort key of a field's values: numbers first, then text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (not is_number, float(value) if is_number else 0.0, str(value))


def text(value: Any) -> str:
    """A field's value as a table cell."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
