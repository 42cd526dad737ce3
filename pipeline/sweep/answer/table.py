"""The answer of a sweep as data, and its table as text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kac.metrics import Metric
from kac.util.errors import one_line
from pipeline.evaluate.scores import Record, aligned, direction
from pipeline.sweep.answer.rows import (
    COST,
    SPEED,
    Row,
    describe,
    front,
    headings,
    make_rows,
    ranked,
    shown_metrics,
    text,
    varied,
)
from pipeline.sweep.ledger import TrialRecord

PRINTED_ROWS = 20
"""Rows of the printed table; the files have all rows."""

STATES = {"finished": "finished", "stopped": "stopped early", "running": "running", "waiting": "waiting"}
"""States in words, in the order of the table; failed trials come last."""


@dataclass(frozen=True)
class Answer:
    """The results of a sweep."""

    rows: Sequence[Row]  # in the order of the sweep
    metric: Metric  # ranks the rows
    record: Record | None  # the evaluation

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
        """The varied fields."""
        return varied(self.rows)

    @cached_property
    def columns(self) -> list[Metric]:
        """The metrics with a column."""
        return shown_metrics(self.rows, self.record, self.metric)

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


def make_answer(trials: Sequence[TrialRecord], record: Record | None, metric: str, better: str) -> Answer:
    """The answer from the trials and the evaluation of their students."""
    return Answer(make_rows(trials, record), describe(metric, record, better), record)


def ordered_rows(answer: Answer) -> list[Row]:
    """The ranked rows, then the others by state."""
    others = [row for row in answer.rows if row not in answer.ranked]
    return [*answer.ranked, *sorted(others, key=lambda row: [*STATES, "failed"].index(row.trial.status))]


def head(answer: Answer, columns: Sequence[Metric]) -> list[str]:
    """The headings of the table with these metrics."""
    fields = ["w" if name == "guidance" else title for name, title in headings(_fields(answer)).items()]
    status = ["status"] if _has_status(answer) else []
    return ["trial", "#", *fields, *(m.heading for m in columns), "trained s", "front", *status]


def cells(answer: Answer, row: Row, columns: Sequence[Metric]) -> list[str]:
    """The cells of a row under ``head``."""
    fields = [
        text(getattr(row, name) if name in {"steps", "guidance"} else row.trial.values.get(name))
        for name in _fields(answer)
    ]
    metrics = [_cell(row, metric) for metric in columns]
    status = [row.trial.status] if _has_status(answer) else []
    return [row.name, str(row.trial.number), *fields, *metrics, f"{row.trial.seconds:,.0f}", answer.marks(row), *status]


def text_table(answer: Answer) -> str:
    """The table as text, best row first, and a summary below it."""
    rows = ordered_rows(answer)
    columns = answer.main_columns
    lines = aligned(head(answer, columns), [cells(answer, row, columns) for row in rows[:PRINTED_ROWS]])
    more = len(rows) - PRINTED_ROWS
    lines += [f"... {more} more in trials.csv"] if more > 0 else []
    return "\n".join([*lines, *summary_lines(answer)])


def summary_lines(answer: Answer) -> list[str]:
    """Lines of text: the number of trials by state, the best trial, and the errors."""
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
    best_line = (
        f"best by {metric.heading}{direction(metric)}: #{best.trial.number} {best.name} with "
        f"{_cell(best, metric)}{cost}{_teacher_for_comparison(answer, best)}"
    )
    return [*lines, best_line, *reasons]


def _teacher_for_comparison(answer: Answer, best: Row) -> str:
    name = answer.metric.name
    for score in answer.record.scores if answer.record else ():
        if (score.kind, score.guidance) == ("teacher", best.guidance) and name in score.metrics:
            value = format(score.metrics[name], answer.metric.format)
            return f"; its teacher has {value} in {score.metrics.get(COST, score.steps or 0):g}"
    return ""


def _fields(answer: Answer) -> list[str]:
    """The varied fields, and the steps and guidance if students were evaluated at several values of them."""
    evaluated = [
        name for name in ("steps", "guidance") if len({str(getattr(row, name)) for row in answer.rows if row.score}) > 1
    ]
    return list(dict.fromkeys([*answer.fields, *evaluated]))


def _has_status(answer: Answer) -> bool:
    """Whether the table has a status column; it has none if all trials are finished."""
    return any(row.trial.status != "finished" for row in answer.rows)


def _cell(row: Row, metric: Metric) -> str:
    if metric.name not in row.metrics:
        return ""
    width = row.score.half_widths.get(metric.name) if row.score else None
    return f"{row.metrics[metric.name]:{metric.format}}" + (f" ±{width:{metric.format}}" if width else "")
