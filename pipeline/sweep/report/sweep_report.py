"""The results of a sweep: every trial with its metrics, their ranking, and the fronts of quality against cost.

An any-step student, or a student of all guidance scales, has one row per evaluated step count and scale.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kac.metrics import Metric
from pipeline import tracking
from pipeline.evaluate.scores import Record, Score, columns
from pipeline.sweep.ledger import TrialRecord

NFE = "nfe"


class Cost(NamedTuple):
    """A cost per image, with a front of quality against it, a plot, and a mark in the tables."""

    name: str  # of its metric
    label: str
    mark: str
    better: Literal["lower", "higher"]
    equal_factor: float = 1.0  # values within this factor count as equal


COSTS = (
    Cost(NFE, "network evaluations per image", "NFE", "lower"),
    Cost("images_per_second", "images per second", "speed", "higher", 1.1),  # repeated measurements differ by 10 %
)
"""The costs in the report. To add a cost, add a line here."""


@dataclass(frozen=True)
class Row:
    """A trial, with one score of its student if there is any."""

    trial: TrialRecord
    values: Mapping[str, Any]  # of the trial, with the evaluated "steps" and "guidance"
    metrics: Mapping[str, float]  # from training and from the evaluation
    score: Score | None = None
    score_index: int | None = None  # in the evaluation

    @property
    def name(self) -> str:
        """The name in the evaluation's table; without an evaluation, the name of the trial."""
        return self.score.name if self.score else self.trial.name

    def cost(self, name: str = NFE) -> float | None:
        """The cost with this name. Without an evaluation only network evaluations are known."""
        return self.metrics.get(name, self.values.get("steps") if name == NFE else None)


class SweepReport:
    """The results of a sweep.

    Args:
        trials: the records of the ledger.
        record: the evaluation of their students, if there is one.
        metric: ranks the rows.
        better: "lower" or "higher".
    """

    def __init__(self, trials: Iterable[TrialRecord], record: Record | None, metric: str, better: str) -> None:
        self.record = record
        self.rows = make_rows(trials, record)
        self.metric = describe(metric, record, better)
        self.ranked = ranked(self.rows, self.metric)
        self.best = self.ranked[0] if self.ranked else None
        self.fronts = {cost: front(self.ranked, cost) for cost in COSTS}
        self.on_front = [row for row in self.rows if self.marks(row)]
        self.on_front.sort(key=lambda row: (row.cost() or 0, row.trial.number))
        names = dict.fromkeys(name for row in self.rows for name in row.values)
        self.varied = [name for name in names if len({str(row.values.get(name)) for row in self.rows}) > 1]
        self.columns = self._columns()

    def _columns(self) -> list[Metric]:
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

    def marks(self, row: Row) -> str:
        """The marks of the fronts that contain the row."""
        return ", ".join(cost.mark for cost, rows in self.fronts.items() if row in rows)


def make_rows(trials: Iterable[TrialRecord], record: Record | None) -> list[Row]:
    """One or more rows per trial, in the order of the sweep."""
    rows = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        reported = {name: value for name, value in trial.metrics.items() if math.isfinite(value)}
        scores = [(index, s) for index, s in enumerate(record.scores if record else ()) if s.folder == trial.out]
        for index, score in scores:
            values = {**trial.values, "steps": score.steps, "guidance": score.guidance}
            rows.append(Row(trial, values, {**reported, **score.metrics}, score, index))
        if not scores:
            rows.append(Row(trial, trial.values, reported))
    return rows


def ranked(rows: Iterable[Row], metric: Metric) -> list[Row]:
    """The rows of finished trials that have the metric, best first. Ties are broken by network evaluations."""
    sign = -1 if metric.better == "higher" else 1
    finished = [row for row in rows if row.trial.status == "finished" and metric.name in row.metrics]
    return sorted(finished, key=lambda row: (sign * row.metrics[metric.name], row.cost() or 0, row.trial.number))


def front(rows: Sequence[Row], cost: Cost) -> list[Row]:
    """The Pareto front of ranked rows, cheapest first: rows that no row of the same or lower cost beats."""
    chosen, cheapest = [], None
    for row in rows:  # best first, so only earlier rows can beat a row
        value = row.cost(cost.name)
        if value is None:
            continue
        low, high = (value, cheapest) if cost.better == "lower" else (cheapest, value)
        if low is None or high is None or low * cost.equal_factor < high:
            chosen.append(row)
            cheapest = value
    return chosen[::-1]


def describe(name: str, record: Record | None, better: str = "") -> Metric:
    """The metric with this name, with a heading that includes prefixes such as ``validation/``."""
    known = (record.metrics() if record else {}).get(name) or tracking.declared(name)
    plain = name.replace("/", " ").replace("_", " ")
    metric: Metric = known or Metric(name, plain)
    heading = metric.heading if "/" not in name and metric.heading else plain
    direction: Any = better or metric.better
    return dataclasses.replace(metric, name=name, heading=heading, better=direction)
