"""Writes the report of a sweep to files and MLflow, and prints its table."""

import io
import json
from collections.abc import Sequence
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq

from kac.util import files
from kac.util.log import log
from pipeline import tracking
from pipeline.config import SweepSpec
from pipeline.evaluate.inputs import ANSWER_FILE
from pipeline.evaluate.scores import REAL, read_record
from pipeline.evaluate.stage import read_shown
from pipeline.outputs import SPEC_FILE
from pipeline.report import pictures
from pipeline.sweep.ledger import TrialRecord
from pipeline.sweep.report import sweep_plots
from pipeline.sweep.report.sweep_page import make_page
from pipeline.sweep.report.sweep_report import COST, SPEED, Row, SweepReport
from pipeline.sweep.report.trial_table import text_table

REPORT_FILE, TABLE_FILE = "report.html", "table.txt"
PARQUET_FILE, CSV_FILE = "trials.parquet", "trials.csv"
PICTURES = "pictures/"
BEST = "best/"
"""Prefix of the best trial's metrics in the sweep's run."""


def write_report(
    spec: SweepSpec,
    trials: Sequence[TrialRecord],
    evaluation: str | None,
    run: tracking.TrackedRun,
    metric: str,
    better: str,
) -> Row | None:
    """Write the report to the sweep's folder and run, and print the table.

    Args:
        evaluation: folder of the evaluation of the finished students, if there is one.
        run: the sweep's run.
        metric: ranks the trials.
        better: "lower" or "higher".

    Returns:
        The best row, if there is any.

    Raises:
        DistillKacError: the evaluation cannot be read.
    """
    report = SweepReport.of(trials, read_record(evaluation) if evaluation else None, metric, better)
    plots, notes = _draw(report, evaluation)
    contents = {
        **_trial_tables(report),
        TABLE_FILE: text_table(report).encode(),
        **{f"{PICTURES}{name}.png": data for name, data in plots.items()},
        REPORT_FILE: make_page(spec, report, plots, notes, run.tracking_uri),
        ANSWER_FILE: json.dumps(_answer(spec, report, evaluation), indent=2).encode(),
    }
    for name, data in contents.items():
        files.write_bytes(files.join(spec.out, name), data)
        run.artifact(name, data)
    _track(report, run)
    log.info(f"{text_table(report)}\nsweep: wrote the report {files.join(spec.out, REPORT_FILE)}")
    return report.best


def _draw(report: SweepReport, evaluation: str | None) -> tuple[dict[str, bytes], dict[str, str]]:
    """The plots by name, and notes on missing plots by section of the page."""
    fronts = {COST: report.by_cost, SPEED: report.by_speed}
    plots = {f"front-{cost}": sweep_plots.front_plot(report, rows, cost) for cost, rows in fronts.items() if rows}
    if sheet := _sample_sheet(report, evaluation):
        plots["samples"] = sheet
    maps = {
        sweep_plots.heat_map_name(metric): data
        for metric in report.columns
        if metric.name != COST and (data := sweep_plots.heat_map(report.rows, metric))
    }
    needed = "Left out: heat maps need finished trials of two step counts and two guidance scales."
    of_parameters, note = sweep_plots.parameter_plots(report)
    return {**plots, **maps, **of_parameters}, {"heat maps": "" if maps else needed, "parameters": note}


def _sample_sheet(report: SweepReport, evaluation: str | None) -> bytes | None:
    """A sheet of held-out images, samples of the front, and samples of its teachers; None without samples."""
    images = read_shown(evaluation) if evaluation else None
    if images is None or report.record is None or not report.on_front:
        return None
    scales = {row.guidance for row in report.on_front}
    front = [(f"#{r.trial.number}  {r.name}", r.score_index) for r in report.on_front if r.score_index is not None]
    scores = list(enumerate(report.record.scores))
    real = [(score.name, index) for index, score in scores if score.kind == REAL]
    teachers = [(s.name, index) for index, s in scores if s.kind == "teacher" and s.guidance in scales]
    return pictures.comparison([(name, images[index]) for name, index in (*real, *front, *teachers)])


def _trial_tables(report: SweepReport) -> dict[str, bytes]:
    """The rows of the report with all their values, as Parquet and CSV files by name."""
    frame = pandas.DataFrame([_values(report, row) for row in report.rows], dtype=object)
    parquet = io.BytesIO()
    pq.write_table(pa.table({name: _column(frame[name]) for name in frame}), parquet)
    return {PARQUET_FILE: parquet.getvalue(), CSV_FILE: frame.to_csv(index=False).encode()}


def _values(report: SweepReport, row: Row) -> dict[str, Any]:
    trial, score = row.trial, row.score
    return {
        "number": trial.number,
        "name": row.name,
        "status": trial.status,
        **trial.values,
        **({"judged_steps": score.steps, "judged_guidance": score.guidance} if score else {}),
        "updates": trial.updates,
        "seconds": trial.seconds,
        "front": report.marks(row),
        **row.metrics,
        **{f"half_width/{name}": value for name, value in (score.half_widths if score else {}).items()},
        "out": trial.out,
        "error": trial.error,
    }


def _column(values: Any) -> pa.Array:
    """The values as one type, as Parquet requires; values of several types become text."""
    try:
        return pa.array(values, from_pandas=True)
    except pa.ArrowException:
        return pa.array(values.map(str, na_action="ignore"), pa.string(), from_pandas=True)


def _answer(spec: SweepSpec, report: SweepReport, evaluation: str | None) -> dict[str, Any]:
    """The content of answer.json, which ``evaluate --from-sweep`` reads."""
    best, path = report.best, files.join(evaluation, SPEC_FILE) if evaluation else None
    options = json.loads(files.read_bytes(path))["options"] if path and files.exists(path) else {}
    return {
        "metric": report.metric.name,
        "better": report.metric.better,
        "best": {"name": best.name, "out": best.trial.out, "metrics": dict(best.metrics)} if best else None,
        "front": list(dict.fromkeys(row.trial.out for row in report.on_front)),
        "teacher": options.get("teacher") or spec.teacher,
        "store": spec.store,
    }


def _track(report: SweepReport, run: tracking.TrackedRun) -> None:
    """Log the best trial's metrics and name to the sweep's run."""
    best = report.best
    if best is None:
        return
    if report.record:
        tracking.declare(*report.record.metrics().values())
    run.metrics({f"{BEST}{name}": value for name, value in best.metrics.items() if tracking.declared(name)})
    run.tags({"distillkac.best": best.name, "distillkac.best.metric": report.metric.name})
