"""The table of a sweep's trials, and its summary, as text."""

from collections import Counter
from collections.abc import Sequence

from kac.metrics import Metric
from kac.util.errors import one_line
from pipeline.evaluate.scores import aligned, direction
from pipeline.sweep.report.sweep_report import COST, Row, SweepReport, headings, text

PRINTED_ROWS = 20
"""Rows of the printed table; the files have all rows."""

STATES = {"finished": "finished", "stopped": "stopped early", "running": "running", "waiting": "waiting"}
"""States in words, in the order of the table; failed trials come last."""


def text_table(report: SweepReport) -> str:
    """The table as text, best row first, and a summary below it."""
    rows = ordered_rows(report)
    lines = aligned(*table(report, rows[:PRINTED_ROWS], report.main_columns))
    more = len(rows) - PRINTED_ROWS
    lines += [f"... {more} more in trials.csv"] if more > 0 else []
    return "\n".join([*lines, *summary_lines(report)])


def ordered_rows(report: SweepReport) -> list[Row]:
    """The ranked rows, then the others by state."""
    others = [row for row in report.rows if row not in report.ranked]
    return [*report.ranked, *sorted(others, key=lambda row: [*STATES, "failed"].index(row.trial.status))]


def table(report: SweepReport, rows: Sequence[Row], metrics: Sequence[Metric]) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of a table with these metrics. ``rows`` is not empty."""
    lines = [_cells(report, row, metrics) for row in rows]
    return [heading for heading, _ in lines[0]], [[cell for _, cell in line] for line in lines]


def _cells(report: SweepReport, row: Row, metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    """The headings and cells of a row. Several metrics may share a heading."""
    evaluated = {"steps": row.steps, "guidance": row.guidance}
    values = {**row.trial.values, **evaluated}
    # The varied fields, and the steps and guidance if students were evaluated at several values of them.
    several = [name for name in evaluated if len({str(getattr(r, name)) for r in report.rows if r.score}) > 1]
    titles = headings(list(dict.fromkeys([*report.fields, *several])))
    is_all_finished = all(other.trial.status == "finished" for other in report.rows)
    return [
        ("trial", row.name),
        ("#", str(row.trial.number)),
        *(("w" if name == "guidance" else title, text(values.get(name))) for name, title in titles.items()),
        *((metric.heading, _cell(row, metric)) for metric in metrics),
        ("trained s", f"{row.trial.seconds:,.0f}"),
        ("front", report.marks(row)),
        *([] if is_all_finished else [("status", row.trial.status)]),
    ]


def summary_lines(report: SweepReport) -> list[str]:
    """Lines of text: the number of trials by state, the best trial, and the errors."""
    trials = list({row.trial.number: row.trial for row in report.rows}.values())
    states = Counter(STATES.get(trial.status, trial.status) for trial in trials)
    seconds = sum(trial.seconds for trial in trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    lines = [f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}: {counts}; {seconds:,.0f} s of training"]
    failed = [trial for trial in trials if trial.status == "failed"]
    reasons = [f"failed: #{t.number} {t.name}: {one_line(t.error or 'no reason given', 300)}" for t in failed]
    best, metric = report.best, report.metric
    if best is None:
        return [*lines, f"no finished trial has the metric {metric.name}", *reasons]
    calls = "network evaluation" if best.cost == 1 else "network evaluations"
    cost = f" in {best.cost:g} {calls}" if best.cost is not None else ""
    best_line = (
        f"best by {metric.heading}{direction(metric)}: #{best.trial.number} {best.name} with "
        f"{_cell(best, metric)}{cost}{_teacher_for_comparison(report, best)}"
    )
    return [*lines, best_line, *reasons]


def _teacher_for_comparison(report: SweepReport, best: Row) -> str:
    name = report.metric.name
    for score in report.record.scores if report.record else ():
        if (score.kind, score.guidance) == ("teacher", best.guidance) and name in score.metrics:
            value = format(score.metrics[name], report.metric.format)
            return f"; its teacher has {value} in {score.metrics.get(COST, score.steps or 0):g}"
    return ""


def _cell(row: Row, metric: Metric) -> str:
    if metric.name not in row.metrics:
        return ""
    width = row.score.half_widths.get(metric.name) if row.score else None
    return f"{row.metrics[metric.name]:{metric.format}}" + (f" ±{width:{metric.format}}" if width else "")
