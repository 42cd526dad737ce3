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
from pipeline.evaluate.scores import read_record
from pipeline.evaluate.stage import read_shown
from pipeline.outputs import SPEC_FILE
from pipeline.sweep.ledger import TrialRecord
from pipeline.sweep.report.sweep_page import make_page
from pipeline.sweep.report.sweep_plots import draw_plots
from pipeline.sweep.report.sweep_report import Row, SweepReport
from pipeline.sweep.report.trial_table import text_table

REPORT_FILE = "report.html"


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
        run: the sweep's run, which also gets the best trial's metrics and name.
        metric: ranks the trials.
        better: "lower" or "higher".

    Returns:
        The best row, if there is any.

    Raises:
        DistillKacError: the evaluation cannot be read.
    """
    report = SweepReport(trials, read_record(evaluation) if evaluation else None, metric, better)
    plots, note = draw_plots(report, read_shown(evaluation) if evaluation else None)
    printed = text_table(report)
    contents = {
        **_trial_tables(report),
        "table.txt": printed.encode(),
        **{f"pictures/{name}.png": plot.png for name, plot in plots.items()},
        REPORT_FILE: make_page(spec, report, plots, note, run.tracking_uri),
        ANSWER_FILE: json.dumps(_answer(spec, report, evaluation), indent=2).encode(),
    }
    for name, data in contents.items():
        files.write_bytes(files.join(spec.out, name), data)
        run.artifact(name, data)
    if report.record:
        tracking.declare(*report.record.metrics().values())
    if best := report.best:
        run.metrics({f"best/{name}": value for name, value in best.metrics.items() if tracking.declared(name)})
        run.tags({"distillkac.best": best.name, "distillkac.best.metric": report.metric.name})
    log.info(f"{printed}\nsweep: wrote the report {files.join(spec.out, REPORT_FILE)}")
    return report.best


def _trial_tables(report: SweepReport) -> dict[str, bytes]:
    """The rows of the report with all their values, as Parquet and CSV files by name."""
    frame = pandas.DataFrame([_values(report, row) for row in report.rows], dtype=object)
    columns = {}
    for name in frame:
        try:
            columns[name] = pa.array(frame[name], from_pandas=True)
        except pa.ArrowException:  # values of several types become text
            columns[name] = pa.array(frame[name].map(str, na_action="ignore"), pa.string(), from_pandas=True)
    parquet = io.BytesIO()
    pq.write_table(pa.table(columns), parquet)
    return {"trials.parquet": parquet.getvalue(), "trials.csv": frame.to_csv(index=False).encode()}


def _values(report: SweepReport, row: Row) -> dict[str, Any]:
    """The columns of the files. To add a column, add a line here."""
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
