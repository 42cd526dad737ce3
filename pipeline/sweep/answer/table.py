"""What a sweep has found, and its table."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kac.metrics import Metric
from kac.util.errors import one_line
from pipeline.evaluate.scores import Record, aligned, direction
from pipeline.sweep.answer.rows import (
    COST,
    SPEED,
    Row,
    Trial,
    describe,
    front,
    headings,
    make_rows,
    ranked,
    shown_metrics,
    text,
    varied,
)

PRINTED_ROWS = 20
"""The printed table has no more rows than this; the files have all."""

STATES = {"finished": "finished", "stopped": "stopped early", "running": "running", "waiting": "waiting"}
"""What trials are called; those that failed are told apart from the rest."""


@dataclass(frozen=True)
class Answer:
    """What a sweep has found."""

    rows: Sequence[Row]  # every trial, in the sweep's order
    metric: Metric  # by which they are compared
    record: Record | None  # of the evaluation

    @cached_property
    def ranked(self) -> list[Row]:
        """The rows of finished trials that have the metric, the best first."""
        return ranked(self.rows, self.metric)

    @property
    def best(self) -> Row | None:
        """The best row, if there is any."""
        return self.ranked[0] if self.ranked else None

    @cached_property
    def by_cost(self) -> list[Row]:
        """The front against network evaluations."""
        return front(self.rows, self.metric, describe(COST, self.record, "lower"))

    @cached_property
    def by_speed(self) -> list[Row]:
        """The front against images a second, the fastest first."""
        return front(self.rows, self.metric, describe(SPEED, self.record, "higher"))

    @cached_property
    def on_front(self) -> list[Row]:
        """The rows of either front, the cheapest first."""
        found = [*self.by_cost, *(row for row in self.by_speed if row not in self.by_cost)]
        return sorted(found, key=lambda row: (row.cost or 0, row.trial.number))

    @cached_property
    def fields(self) -> list[str]:
        """What was varied."""
        return varied(self.rows)

    @cached_property
    def columns(self) -> list[Metric]:
        """The metrics that have a column, the sweep's own first."""
        return shown_metrics(self.rows, self.record, self.metric)

    @cached_property
    def main_columns(self) -> list[Metric]:
        """As many of them as a terminal has room for: the sweep's own, what it is set against, and its neighbours."""
        ratio = self.metric.name.replace("frechet_distance", "frechet_ratio")
        wanted = {self.metric.name, ratio, "label_agreement", COST, SPEED}
        return [metric for metric in self.columns if metric.name in wanted]

    def marks(self, row: Row) -> str:
        """On which fronts a row is."""
        fronts = {"NFE": self.by_cost, "speed": self.by_speed}
        return ", ".join(name for name, found in fronts.items() if row in found)


def make_answer(trials: Sequence[Trial], record: Record | None, metric: str, better: str) -> Answer:
    """What is found of the trials and the evaluation of their students."""
    return Answer(make_rows(trials, record), describe(metric, record, better), record)


def in_order(answer: Answer) -> list[Row]:
    """The ranked rows, and below them the others."""
    others = [row for row in answer.rows if row not in answer.ranked]
    return [*answer.ranked, *sorted(others, key=lambda row: [*STATES, "failed"].index(row.trial.status))]


def head(answer: Answer, columns: Sequence[Metric]) -> list[str]:
    """The headings of the table with these metrics."""
    fields = ["w" if name == "guidance" else title for name, title in headings(_fields(answer)).items()]
    return ["trial", "#", *fields, *(m.heading for m in columns), "trained s", "front", *_state(answer, "status")]


def line(answer: Answer, row: Row, columns: Sequence[Metric]) -> list[str]:
    """The cells of a row under ``head``."""
    fields = [text(_value(row, name)) for name in _fields(answer)]
    metrics = [_cell(row, metric) for metric in columns]
    seconds, state = f"{row.trial.seconds:,.0f}", _state(answer, row.trial.status)
    return [row.name, str(row.trial.number), *fields, *metrics, seconds, answer.marks(row), *state]


def printed(answer: Answer) -> str:
    """The table as text, the best on top, and what it comes to below it."""
    rows = in_order(answer)
    columns = answer.main_columns
    lines = aligned(head(answer, columns), [line(answer, row, columns) for row in rows[:PRINTED_ROWS]])
    more = len(rows) - PRINTED_ROWS
    lines += [f"... {more} more in trials.csv"] if more > 0 else []
    return "\n".join([*lines, *told(answer)])


def told(answer: Answer) -> list[str]:
    """In words: what became of the trials, and which is the best."""
    trials = list({row.trial.number: row.trial for row in answer.rows}.values())
    states = Counter(STATES.get(trial.status, trial.status) for trial in trials)
    seconds = sum(trial.seconds for trial in trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    lines = [f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}: {counts}; {seconds:,.0f} s of training"]
    failed = [trial for trial in trials if trial.status == "failed"]
    reasons = [f"failed: #{t.number} {t.name}: {one_line(t.error or 'no reason given', 300)}" for t in failed]
    best, metric = answer.best, answer.metric
    if best is None:
        return [*lines, f"no finished trial has the metric {metric.name}", *reasons]
    calls = "network evaluation" if best.cost == 1 else "network evaluations"
    cost = f" in {best.cost:g} {calls}" if best.cost is not None else ""
    found = (
        f"best by {metric.heading}{direction(metric)}: #{best.trial.number} {best.name} with "
        f"{_cell(best, metric)}{cost}{_beside_teacher(answer, best)}"
    )
    return [*lines, found, *reasons]


def _beside_teacher(answer: Answer, best: Row) -> str:
    name = answer.metric.name
    for score in answer.record.scores if answer.record else ():
        if (score.kind, score.guidance) == ("teacher", best.guidance) and name in score.metrics:
            value = format(score.metrics[name], answer.metric.format)
            return f"; its teacher {value} in {score.metrics.get(COST, score.steps or 0):g}"
    return ""


def _fields(answer: Answer) -> list[str]:
    """The varied fields, and the steps and scales at which students of any were judged."""
    judged = [
        name for name in ("steps", "guidance") if len({str(getattr(row, name)) for row in answer.rows if row.score}) > 1
    ]
    return list(dict.fromkeys([*answer.fields, *judged]))


def _value(row: Row, name: str) -> Any:
    return getattr(row, name) if name in {"steps", "guidance"} else row.trial.values.get(name)


def _state(answer: Answer, cell: str) -> list[str]:
    """A column that is left out if all trials are finished."""
    return [cell] if any(row.trial.status != "finished" for row in answer.rows) else []


def _cell(row: Row, metric: Metric) -> str:
    if metric.name not in row.metrics:
        return ""
    width = row.score.half_widths.get(metric.name) if row.score else None
    return f"{row.metrics[metric.name]:{metric.format}}" + (f" ±{width:{metric.format}}" if width else "")
