"""A sweep's results: trials with their metrics and ranking, fronts of quality against cost, and the table.

An any-step student, or a student of all guidance scales, has one row per evaluated step count and scale.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

from kac.metrics import Metric
from kac.util.errors import one_line
from pipeline import tracking
from pipeline.config import AnySweep, TeachSweepSpec
from pipeline.evaluate.scores import Record, Score, aligned, columns, direction
from pipeline.sweep.ledger import TrialRecord
from pipeline.sweep.planned_trials import UPDATES

NFE = "nfe"


class Cost(NamedTuple):
    """A cost per image. For each cost, the report has a front, a plot of quality against cost, and a mark in tables."""

    name: str  # name of the metric
    label: str
    mark: str
    better: Literal["lower", "higher"]
    equal_factor: float = 1.0  # values within this factor count as equal


UPDATES_COST = Cost("updates", "training updates", "updates", "lower")
"""The cost of teachers in a sweep that varies their updates. Their sampling costs are equal."""

MOST_SHOWN = 6
"""Number of teachers whose samples are shown if there is no front."""

COSTS = (
    Cost(NFE, "network evaluations per image", "NFE", "lower"),
    Cost("images_per_second", "images per second", "speed", "higher", 1.1),  # repeated measurements differ by 10 %
)
"""The costs in the report. To add a cost, add a line here."""


@dataclass(frozen=True)
class Row:
    """A trial, with one score of its model if the model was evaluated."""

    trial: TrialRecord
    values: Mapping[str, Any]  # the trial's values, with the evaluated "steps" and "guidance" of a student
    metrics: Mapping[str, float]  # from training and from the evaluation
    score: Score | None = None

    @property
    def name(self) -> str:
        """The name in the evaluation's table; for a teacher, or without an evaluation, the name of the trial."""
        return self.score.name if self.score and self.score.kind == "student" else self.trial.name

    def cost(self, name: str = NFE) -> float | None:
        """The cost with this name. Without an evaluation, only the number of network evaluations is known."""
        known = {NFE: self.values.get("steps"), UPDATES_COST.name: self.trial.updates}
        return self.metrics.get(name, known.get(name))


class SweepResults:
    """The trials of a sweep, with the evaluation of their models if they were evaluated."""

    def __init__(
        self,
        trials: Iterable[TrialRecord],
        record: Record | None,
        metric: str,
        better: str,
        spec: AnySweep | None = None,
    ) -> None:
        if record:
            tracking.declare(*record.metrics().values())
        self.record = record
        self.rows = make_rows(trials, record)
        self.metric = describe(metric, better)
        self.ranked = ranked(self.rows, self.metric)
        self.best = self.ranked[0] if self.ranked else None
        names = dict.fromkeys(name for row in self.rows for name in row.values)
        self.varied = [name for name in names if len({str(row.values.get(name)) for row in self.rows}) > 1]
        costs: tuple[Cost, ...] = COSTS
        self.planes = [("steps", "guidance")]
        if isinstance(spec, TeachSweepSpec):
            costs = (UPDATES_COST,) if UPDATES in self.varied and not spec.budget_seconds else ()
            self.planes = [pair for pair in combinations(self.varied, 2) if is_plane(self.rows, pair)]
        self.fronts = {cost: front(self.ranked, cost) for cost in costs}
        self.on_front = [row for row in self.rows if self.marks(row)] if costs else self.ranked[:MOST_SHOWN]
        if costs:
            self.on_front.sort(key=lambda row: (row.cost(costs[0].name) or 0, row.trial.number))
        folders = {row.trial.out for row in self.rows}
        scores = record.scores if record else ()
        self.teachers = [score for score in scores if score.kind == "teacher" and score.folder not in folders]
        self.columns = self._columns()

    def _columns(self) -> list[Metric]:
        """The metrics that have a column: the evaluation's metrics, the ranking metric and validation metrics."""
        reported = sorted({name for row in self.rows for name in row.trial.metrics if name.startswith("validation/")})
        evaluated = [metric.name for metric in columns(self.record)] if self.record else []
        names = dict.fromkeys([*evaluated, self.metric.name, *reported])
        present = [name for name in names if any(name in row.metrics for row in self.rows)]
        return [self.metric if name == self.metric.name else describe(name) for name in present]

    def best_by_updates(self) -> dict[int, Row]:
        """The best teacher of each number of updates with several finished trials, if the sweep varies the number."""
        counts = Counter(row.trial.updates for row in self.ranked if UPDATES_COST in self.fronts)
        best = {row.trial.updates: row for row in reversed(self.ranked)}
        return {updates: best[updates] for updates in sorted(counts) if counts[updates] > 1}

    def marks(self, row: Row) -> str:
        """The marks of the fronts that contain the row."""
        return ", ".join(cost.mark for cost, rows in self.fronts.items() if row in rows)


def is_plane(rows: Iterable[Row], fields: tuple[str, str]) -> bool:
    """Whether a heat map over two fields would have values in more than half of its cells."""
    cells = {tuple(str(row.values.get(name)) for name in fields) for row in rows}
    heights, widths = (set(values) for values in zip(*cells, strict=True))
    return 2 * len(cells) > len(heights) * len(widths)


def make_rows(trials: Iterable[TrialRecord], record: Record | None) -> list[Row]:
    """One or more rows per trial, in the order of the sweep."""
    rows = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        reported = {name: value for name, value in trial.metrics.items() if math.isfinite(value)}
        scores = [score for score in (record.scores if record else ()) if score.folder == trial.out]
        for score in scores:
            own = {"steps": score.steps, "guidance": score.guidance} if score.kind == "student" else {}
            values = {**trial.values, **own}
            rows.append(Row(trial, values, {**reported, **score.metrics}, score))
        if not scores:
            rows.append(Row(trial, trial.values, reported))
    return rows


def ranked(rows: Iterable[Row], metric: Metric) -> list[Row]:
    """The rows of finished trials that have the metric, best first. Ties are broken by network evaluations."""
    sign = -1 if metric.better == "higher" else 1
    finished = [row for row in rows if row.trial.status == "finished" and metric.name in row.metrics]
    return sorted(finished, key=lambda row: (sign * row.metrics[metric.name], row.cost() or 0, row.trial.number))


def front(rows: Sequence[Row], cost: Cost) -> list[Row]:
    """The Pareto front of ranked rows, cheapest first: the rows that no row of equal or lower cost beats."""

    def is_cheaper(value: float, other: float) -> bool:
        return value > cost.equal_factor * other if cost.better == "higher" else cost.equal_factor * value < other

    costs = [(value, row) for row in rows if (value := row.cost(cost.name)) is not None]
    # The best row is first, so only earlier rows can beat a row.
    return [row for n, (v, row) in enumerate(costs) if all(is_cheaper(v, w) for w, _ in costs[:n])][::-1]


def describe(name: str, better: str = "") -> Metric:
    """The metric with this name. Its heading includes prefixes such as ``validation/``."""
    plain = name.replace("/", " ").replace("_", " ")
    metric = tracking.declared(name) or Metric(name, plain)
    heading = metric.heading if "/" not in name and metric.heading else plain
    direction: Any = better or metric.better
    return dataclasses.replace(metric, name=name, heading=heading, better=direction)


PRINTED_ROWS = 20
"""Maximum number of rows in the printed table. The files have all rows."""


def text_table(results: SweepResults) -> str:
    """The table as text, best row first, and a summary below it."""
    rows = ordered_rows(results)
    lines = aligned(*table(results, rows[:PRINTED_ROWS], main_columns(results)))
    if len(rows) > PRINTED_ROWS:
        lines.append(f"... {len(rows) - PRINTED_ROWS} more in trials.csv")
    return "\n".join([*lines, *summary_lines(results)])


def ordered_rows(results: SweepResults) -> list[Row]:
    """The ranked rows, then the other rows, sorted by state."""
    others = [row for row in results.rows if row not in results.ranked]
    return [*results.ranked, *sorted(others, key=lambda row: (row.trial.status == "failed", row.trial.status))]


def main_columns(results: SweepResults) -> list[Metric]:
    """The metrics that fit a terminal: the ranking metric, its ratio to the teacher, label agreement and costs."""
    ratio = results.metric.name.replace("frechet_distance", "frechet_ratio")
    wanted = {results.metric.name, ratio, "label_agreement", *(cost.name for cost in COSTS)}
    return [metric for metric in results.columns if metric.name in wanted]


def table(results: SweepResults, rows: Sequence[Row], metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of a table with these metrics. ``rows`` is not empty."""
    lines = [_cells(results, row, metrics) for row in rows]
    return [heading for heading, _ in lines[0]], [[cell for _, cell in line] for line in lines]


def _cells(results: SweepResults, row: Row, metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    """The headings and cells of a row, from left to right. To add a column, add a line here."""
    cells = [
        ("trial", row.name),
        ("#", str(row.trial.number)),
        *(
            ("w" if name == "guidance" else title, text(row.values.get(name)))
            for name, title in headings(results.varied).items()
        ),
        *((metric.heading, _value(row, metric)) for metric in metrics),
        ("trained s", f"{row.trial.seconds:,.0f}"),
    ]
    if results.fronts:
        cells.append(("front", results.marks(row)))
    if any(other.trial.status != "finished" for other in results.rows):
        cells.append(("status", row.trial.status))
    return cells


def summary_lines(results: SweepResults) -> list[str]:
    """Lines of text: the number of trials by state, the best trial, and the errors."""
    trials = list({row.trial.number: row.trial for row in results.rows}.values())
    states = Counter(trial.status.replace("stopped", "stopped early") for trial in trials)
    seconds = sum(trial.seconds for trial in trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    best, metric = results.best, results.metric
    best_line = f"no finished trial has the metric {metric.name}"
    if best is not None:
        cost = f" in {best.cost():g} network evaluation{'s' * (best.cost() != 1)}" if best.cost() is not None else ""
        best_line = (
            f"best by {metric.heading}{direction(metric)}: #{best.trial.number} {best.name} with "
            f"{_value(best, metric)}{cost}{_teacher_for_comparison(results, best)}"
        )
    return [
        f"{len(trials)} trial{'s' * (len(trials) != 1)}: {counts}; {seconds:,.0f} s of training",
        best_line,
        *(
            f"best after {updates:,} updates: #{row.trial.number} {row.name} with {_value(row, metric)}"
            for updates, row in results.best_by_updates().items()
        ),
        *(
            f"failed: #{trial.number} {trial.name}: {one_line(trial.error or 'no reason given', 300)}"
            for trial in trials
            if trial.status == "failed"
        ),
    ]


def _teacher_for_comparison(results: SweepResults, best: Row) -> str:
    name = results.metric.name
    for score in results.teachers:
        if score.guidance == best.values.get("guidance") and name in score.metrics:
            return (
                f"; its teacher has {score.metrics[name]:{results.metric.format}} in {score.metrics['nfe']:g} "
                "network evaluations"
            )
    return ""


def headings(names: Sequence[str]) -> dict[str, str]:
    """Headings by field: the last part of the dotted name, or the whole name if two fields share the last part."""
    short = {name: name.removesuffix(".kind").rsplit(".", 1)[-1].replace("_", " ") for name in names}
    counts = Counter(short.values())
    return {name: title if counts[title] == 1 else name for name, title in short.items()}


def text(value: Any) -> str:
    """A field's value as a table cell."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(row: Row, metric: Metric) -> str:
    """The value of a metric as a table cell, with the half width of its 95 % interval if that is known."""
    if metric.name not in row.metrics:
        return ""
    width = row.score.half_widths.get(metric.name) if row.score else None
    return f"{row.metrics[metric.name]:{metric.format}}" + (f" ±{width:{metric.format}}" if width else "")
