"""Writes the answer of a sweep to files and MLflow, and prints its table."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

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
from pipeline.sweep.answer import plots
from pipeline.sweep.answer.answer_page import make_page
from pipeline.sweep.answer.rows import COST, SPEED, Row, describe
from pipeline.sweep.answer.table import Answer, make_answer, text_table
from pipeline.sweep.ledger import TrialRecord

REPORT_FILE, TABLE_FILE = "report.html", "table.txt"
PARQUET_FILE, CSV_FILE = "trials.parquet", "trials.csv"
PICTURES = "pictures/"
BEST = "best/"
"""Prefix of the best trial's metrics in the sweep's run."""


def write_answer(
    spec: SweepSpec,
    trials: Sequence[TrialRecord],
    evaluation: str | None,
    run: tracking.TrackedRun,
    metric: str,
    better: str,
) -> None:
    """Write the answer to the sweep's folder and run, and print the table.

    Args:
        evaluation: folder of the evaluation of the finished students, if there is one.
        run: the sweep's run.
        metric: ranks the trials.
        better: "lower" or "higher".

    Raises:
        DistillKacError: the evaluation cannot be read.
    """
    record = read_record(evaluation) if evaluation else None
    answer = make_answer(trials, record, metric, better)
    drawn, notes = draw(answer, evaluation)
    contents = {
        **trial_tables(answer),
        TABLE_FILE: text_table(answer).encode(),
        **{f"{PICTURES}{name}.png": data for name, data in drawn.items()},
        REPORT_FILE: make_page(spec, answer, drawn, notes, run.tracking_uri),
        ANSWER_FILE: json.dumps(_summary(spec, answer, evaluation), indent=2).encode(),
    }
    for name, data in contents.items():
        files.write_bytes(files.join(spec.out, name), data)
        run.artifact(name, data)
    _track(answer, run)
    log.info(f"{text_table(answer)}\nsweep: wrote the report {files.join(spec.out, REPORT_FILE)}")


def draw(answer: Answer, evaluation: str | None) -> tuple[dict[str, bytes], dict[str, str]]:
    """The plots by name, and notes on missing plots by section of the page."""
    rows, metric, record = answer.rows, answer.metric, answer.record
    drawn: dict[str, bytes] = {}
    notes: dict[str, str] = {}
    for name, on_front in ((COST, answer.by_cost), (SPEED, answer.by_speed)):
        if on_front:
            drawn[f"front-{name}"] = plots.front(rows, on_front, metric, describe(name, record), record)
    sheet = _sample_sheet(answer, evaluation)
    if sheet:
        drawn["samples"] = sheet
    maps = {m.name: plots.heat_map(rows, m) for m in answer.columns if m.name != COST}
    drawn |= {f"heat-map-{name.replace('/', '-')}": data for name, data in maps.items() if data}
    if not any(maps.values()):
        notes["heat maps"] = "Left out: heat maps need finished trials of two step counts and two guidance scales."
    of_parameters, notes["parameters"] = plots.parameters(rows, answer.fields, metric)
    return drawn | of_parameters, notes


def _sample_sheet(answer: Answer, evaluation: str | None) -> bytes | None:
    """A sheet of held-out images, samples of the front, and samples of its teachers; None without samples."""
    images = read_shown(evaluation) if evaluation else None
    if images is None or answer.record is None or not answer.on_front:
        return None
    scores = answer.record.scores
    scales = {row.guidance for row in answer.on_front}
    front = [
        (f"#{row.trial.number}  {row.name}", row.score_index) for row in answer.on_front if row.score_index is not None
    ]
    real = [(score.name, index) for index, score in enumerate(scores) if score.kind == REAL]
    teachers = [(s.name, index) for index, s in enumerate(scores) if s.kind == "teacher" and s.guidance in scales]
    return pictures.comparison([(name, images[index]) for name, index in (*real, *front, *teachers)])


def trial_tables(answer: Answer) -> dict[str, bytes]:
    """The rows of the answer with all their values, as Parquet and CSV files by name."""
    lines = [_record(answer, row) for row in answer.rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    columns = {name: _column([line.get(name) for line in lines]) for name in names}
    parquet, text = io.BytesIO(), io.StringIO()
    pq.write_table(pa.table(columns), parquet)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([line.get(name) for name in names] for line in lines)
    return {PARQUET_FILE: parquet.getvalue(), CSV_FILE: text.getvalue().encode()}


def _record(answer: Answer, row: Row) -> dict[str, Any]:
    trial = row.trial
    judged = {"judged_steps": row.score.steps, "judged_guidance": row.score.guidance} if row.score else {}
    widths = row.score.half_widths if row.score else {}
    return {
        "number": trial.number,
        "name": row.name,
        "status": trial.status,
        **trial.values,
        **judged,
        "updates": trial.updates,
        "seconds": trial.seconds,
        "front": answer.marks(row),
        **row.metrics,
        **{f"half_width/{name}": value for name, value in widths.items()},
        "out": trial.out,
        "error": trial.error,
    }


def _column(values: list[Any]) -> list[Any]:
    """The values as one type, as Parquet requires: all numbers become floats, mixed types become text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and kinds <= {str, bool}):
        return [float(v) if v is not None and kinds == {int, float} else v for v in values]
    return [None if value is None else str(value) for value in values]


def _summary(spec: SweepSpec, answer: Answer, evaluation: str | None) -> dict[str, Any]:
    """The content of answer.json, which ``evaluate --from-sweep`` reads."""
    best = answer.best
    return {
        "metric": answer.metric.name,
        "better": answer.metric.better,
        "best": {"name": best.name, "out": best.trial.out, "metrics": dict(best.metrics)} if best else None,
        "front": list(dict.fromkeys(row.trial.out for row in answer.on_front)),
        "teacher": _evaluated_teacher(evaluation) or spec.teacher,
        "store": spec.store,
    }


def _evaluated_teacher(evaluation: str | None) -> str | None:
    path = files.join(evaluation, SPEC_FILE) if evaluation else None
    if path is None or not files.exists(path):
        return None
    teacher: str | None = json.loads(files.read_bytes(path))["options"].get("teacher")
    return teacher


def _track(answer: Answer, run: tracking.TrackedRun) -> None:
    """Log the best trial's metrics and name to the sweep's run."""
    best = answer.best
    if best is None:
        return
    if answer.record:
        tracking.declare(*answer.record.metrics().values())
    run.metrics({f"{BEST}{name}": value for name, value in best.metrics.items() if tracking.declared(name)})
    run.tags({"distillkac.best": best.name, "distillkac.best.metric": answer.metric.name})
