"""The answer of a sweep: from the trials and the evaluation of their students to files, MLflow and a printed table."""

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
from pipeline.config.specs import SweepSpec
from pipeline.evaluate.inputs import ANSWER_FILE
from pipeline.evaluate.scores import REAL, read_record
from pipeline.evaluate.stage import read_shown
from pipeline.outputs import SPEC_FILE
from pipeline.report import pictures as sheets
from pipeline.sweep.answer import pictures
from pipeline.sweep.answer.page import make_page
from pipeline.sweep.answer.rows import COST, SPEED, Trial, describe
from pipeline.sweep.answer.table import Answer, make_answer, printed

REPORT_FILE, TABLE_FILE = "report.html", "table.txt"
PARQUET_FILE, CSV_FILE = "trials.parquet", "trials.csv"
PICTURES = "pictures/"
BEST = "best/"
"""Before the metrics of the best trial, in the sweep's run."""


def write_answer(
    spec: SweepSpec,
    trials: Sequence[Trial],
    evaluation: str | None,
    run: tracking.TrackedRun,
    metric: str,
    better: str,
) -> None:
    """Write what the sweep found into its folder and its run, and print the table.

    Args:
        evaluation: the folder of the evaluation of the finished students, if there is one.
        run: the sweep's own. metric: by which trials are compared. better: "lower" or "higher".

    Raises:
        DistillKacError: the evaluation cannot be read.
    """
    record = read_record(evaluation) if evaluation else None
    answer = make_answer(trials, record, metric, better)
    drawn, notes = draw(answer, evaluation)
    made = {
        **trial_tables(answer),
        TABLE_FILE: printed(answer).encode(),
        **{f"{PICTURES}{name}.png": data for name, data in drawn.items()},
        REPORT_FILE: make_page(spec, answer, drawn, notes, run.tracking_uri),
        ANSWER_FILE: json.dumps(_summary(spec, answer, evaluation), indent=2).encode(),
    }
    for name, data in made.items():
        files.write_bytes(files.join(spec.out, name), data)
        run.artifact(name, data)
    _track(answer, run)
    log.info(f"{printed(answer)}\nsweep: the report is {files.join(spec.out, REPORT_FILE)}")


def draw(answer: Answer, evaluation: str | None) -> tuple[dict[str, bytes], dict[str, str]]:
    """The pictures by name, and why others are left out, by the part of the page that they belong to."""
    rows, metric, record = answer.rows, answer.metric, answer.record
    drawn: dict[str, bytes] = {}
    notes: dict[str, str] = {}
    for name, on_front in ((COST, answer.by_cost), (SPEED, answer.by_speed)):
        if on_front:
            drawn[f"front-{name}"] = pictures.front(rows, on_front, metric, describe(name, record), record)
    sheet = _sheet(answer, evaluation)
    if sheet:
        drawn["samples"] = sheet
    maps = {m.name: pictures.heat_map(rows, m) for m in answer.columns if m.name != COST}
    drawn |= {f"heat-map-{name.replace('/', '-')}": data for name, data in maps.items() if data}
    if not any(maps.values()):
        notes["heat maps"] = "Left out: they need finished trials of two step counts and two guidance scales."
    found, notes["parameters"] = pictures.parameters(rows, answer.fields, metric)
    return drawn | found, notes


def _sheet(answer: Answer, evaluation: str | None) -> bytes | None:
    """Samples of the front below real images, and its teachers' last; None where nothing was drawn."""
    images = read_shown(evaluation) if evaluation else None
    if images is None or answer.record is None or not answer.on_front:
        return None
    scores = answer.record.scores
    scales = {row.guidance for row in answer.on_front}
    front = [(f"#{row.trial.number}  {row.name}", row.place) for row in answer.on_front if row.place is not None]
    real = [(score.name, place) for place, score in enumerate(scores) if score.kind == REAL]
    teachers = [(s.name, place) for place, s in enumerate(scores) if s.kind == "teacher" and s.guidance in scales]
    return sheets.comparison([(name, images[place]) for name, place in (*real, *front, *teachers)])


def trial_tables(answer: Answer) -> dict[str, bytes]:
    """Every trial with all that is known of it, as Parquet and as CSV; one of several judged ways has a line each."""
    lines = [_line(answer, row) for row in answer.rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    columns = {name: _column([line.get(name) for line in lines]) for name in names}
    parquet, text = io.BytesIO(), io.StringIO()
    pq.write_table(pa.table(columns), parquet)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([line.get(name) for name in names] for line in lines)
    return {PARQUET_FILE: parquet.getvalue(), CSV_FILE: text.getvalue().encode()}


def _line(answer: Answer, row: Any) -> dict[str, Any]:
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
    """Values of one type, as a column of Parquet must have; numbers beside words become words."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and kinds <= {str, bool}):
        return [float(v) if v is not None and kinds == {int, float} else v for v in values]
    return [None if value is None else str(value) for value in values]


def _summary(spec: SweepSpec, answer: Answer, evaluation: str | None) -> dict[str, Any]:
    """What another command needs to go on from here."""
    best = answer.best
    return {
        "metric": answer.metric.name,
        "better": answer.metric.better,
        "best": {"name": best.name, "out": best.trial.out, "metrics": dict(best.metrics)} if best else None,
        "front": list(dict.fromkeys(row.trial.out for row in answer.on_front)),
        "teacher": _teacher(evaluation) or spec.teacher,
        "store": spec.store,
    }


def _teacher(evaluation: str | None) -> str | None:
    path = files.join(evaluation, SPEC_FILE) if evaluation else None
    if path is None or not files.exists(path):
        return None
    found: str | None = json.loads(files.read_bytes(path))["options"].get("teacher")
    return found


def _track(answer: Answer, run: tracking.TrackedRun) -> None:
    """The best trial's metrics and name, where MLflow's list of runs shows them."""
    best = answer.best
    if best is None:
        return
    if answer.record:
        tracking.declare(*answer.record.metrics().values())
    known = {name: value for name, value in best.metrics.items() if tracking.declared(name)}
    run.metrics({f"{BEST}{name}": value for name, value in known.items()})
    run.tags({"distillkac.best": best.name, "distillkac.best.metric": answer.metric.name})
