"""The table of a sweep's trials, and its summary, as text."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from kac.metrics import Metric
from kac.util.errors import one_line
from pipeline.evaluate.scores import aligned, direction
from pipeline.sweep.report.sweep_report import COSTS, Row, SweepReport

PRINTED_ROWS = 20
"""Rows of the printed table; the files have all rows."""


def text_table(report: SweepReport) -> str:
    """The table as text, best row first, and a summary below it."""
    rows = ordered_rows(report)
    lines = aligned(*table(report, rows[:PRINTED_ROWS], main_columns(report)))
    if len(rows) > PRINTED_ROWS:
        lines.append(f"... {len(rows) - PRINTED_ROWS} more in trials.csv")
    return "\n".join([*lines, *summary_lines(report)])


def ordered_rows(report: SweepReport) -> list[Row]:
    """The ranked rows, then the others by state."""
    others = [row for row in report.rows if row not in report.ranked]
    return [*report.ranked, *sorted(others, key=lambda row: (row.trial.status == "failed", row.trial.status))]


def main_columns(report: SweepReport) -> list[Metric]:
    """The metrics that fit a terminal: the ranking metric, its ratio to the teacher, label agreement and costs."""
    ratio = report.metric.name.replace("frechet_distance", "frechet_ratio")
    wanted = {report.metric.name, ratio, "label_agreement", *(cost.name for cost in COSTS)}
    return [metric for metric in report.columns if metric.name in wanted]


def table(report: SweepReport, rows: Sequence[Row], metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of a table with these metrics. ``rows`` is not empty."""
    lines = [_cells(report, row, metrics) for row in rows]
    return [heading for heading, _ in lines[0]], [[cell for _, cell in line] for line in lines]


def _cells(report: SweepReport, row: Row, metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    """The headings and cells of a row, from left to right. To add a column, add a line here."""
    cells = [
        ("trial", row.name),
        ("#", str(row.trial.number)),
        *(
            ("w" if name == "guidance" else title, text(row.values.get(name)))
            for name, title in headings(report.varied).items()
        ),
        *((metric.heading, _value(row, metric)) for metric in metrics),
        ("trained s", f"{row.trial.seconds:,.0f}"),
        ("front", report.marks(row)),
    ]
    if any(other.trial.status != "finished" for other in report.rows):
        cells.append(("status", row.trial.status))
    return cells


def summary_lines(report: SweepReport) -> list[str]:
    """Lines of text: the number of trials by state, the best trial, and the errors."""
    trials = list({row.trial.number: row.trial for row in report.rows}.values())
    states = Counter(trial.status.replace("stopped", "stopped early") for trial in trials)
    seconds = sum(trial.seconds for trial in trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    best, metric = report.best, report.metric
    best_line = f"no finished trial has the metric {metric.name}"
    if best is not None:
        cost = f" in {best.cost():g} network evaluation{'s' * (best.cost() != 1)}" if best.cost() is not None else ""
        best_line = (
            f"best by {metric.heading}{direction(metric)}: #{best.trial.number} {best.name} with "
            f"{_value(best, metric)}{cost}{_teacher_for_comparison(report, best)}"
        )
    return [
        f"{len(trials)} trial{'s' * (len(trials) != 1)}: {counts}; {seconds:,.0f} s of training",
        best_line,
        *(
            f"failed: #{trial.number} {trial.name}: {one_line(trial.error or 'no reason given', 300)}"
            for trial in trials
            if trial.status == "failed"
        ),
    ]


def _teacher_for_comparison(report: SweepReport, best: Row) -> str:
    name = report.metric.name
    for score in report.record.scores if report.record else ():
        if score.kind == "teacher" and score.guidance == best.values["guidance"] and name in score.metrics:
            return f"; its teacher has {score.metrics[name]:{report.metric.format}} in {score.metrics['nfe']:g}"
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
    """The value of a metric as a table cell, with half of its 95 % interval if that is known."""
    if metric.name not in row.metrics:
        return ""
    width = row.score.half_widths.get(metric.name) if row.score else None
    return f"{row.metrics[metric.name]:{metric.format}}" + (f" ±{width:{metric.format}}" if width else "")
