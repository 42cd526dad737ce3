"""Writes a sweep's report (its files and page), logs the files to MLflow, and prints the table.

OUT/answer.json                      the best trial, and the folders of the students on the front
OUT/trials.parquet, trials.csv       every trial: its values, its state and its metrics
OUT/table.txt                        the printed table
OUT/report.html                      a self-contained page
OUT/pictures/*.png                   the plots of the page
"""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq

from kac.metrics import Metric
from kac.util import files
from kac.util.log import log
from pipeline import tracking
from pipeline.config import AnySweep, TeachSweepSpec
from pipeline.evaluate.inputs import ANSWER_FILE
from pipeline.evaluate.results import read_shown
from pipeline.evaluate.scores import provenance, read_record
from pipeline.outputs import SPEC_FILE
from pipeline.report import page
from pipeline.sweep.ledger import TrialRecord
from pipeline.sweep.sweep_plots import Plot, draw_plots
from pipeline.sweep.sweep_results import (
    Row,
    SweepResults,
    main_columns,
    ordered_rows,
    summary_lines,
    table,
    text_table,
)

REPORT_FILE = "report.html"


def write_report(
    spec: AnySweep,
    trials: Sequence[TrialRecord],
    evaluations: Sequence[str],
    run: tracking.TrackedRun,
    metric: str,
    better: str,
) -> Row | None:
    """Write the report to the sweep's folder and run, print the table, and return the best row, or None.

    Args:
        evaluations: folders of the evaluations of the finished models, which have the same real images.
        metric: name of the metric that ranks the trials.
        better: "lower" or "higher".
    """
    records = [read_record(folder) for folder in evaluations]
    floors = sum(score.steps is None for score in records[0].scores) if records else 0
    scores = _joined([record.scores for record in records], floors)
    record = records[0].model_copy(update={"scores": tuple(scores)}) if records else None
    results = SweepResults(trials, record, metric, better, spec)
    shown = [read_shown(folder) for folder in evaluations]
    plots, note = draw_plots(results, _joined([each for each in shown if each], floors) if all(shown) else None)
    printed = text_table(results)
    contents = {
        **_trial_tables(results),
        "table.txt": printed.encode(),
        **{f"pictures/{name}.png": plot.png for name, plot in plots.items()},
        REPORT_FILE: make_page(spec, results, plots, note, run.tracking_uri),
        ANSWER_FILE: json.dumps(_answer(spec, results, evaluations), indent=2).encode(),
    }
    for name, data in contents.items():
        files.write_bytes(files.join(spec.out, name), data)
        run.artifact(name, data)
    if best := results.best:
        run.metrics({f"best/{name}": value for name, value in best.metrics.items() if tracking.declared(name)})
        run.tags({"distillkac.best": best.name, "distillkac.best.metric": results.metric.name})
    log.info(f"{printed}\nsweep: wrote the report {files.join(spec.out, REPORT_FILE)}")
    return results.best


def _joined(rows: Sequence[Sequence[Any]], floors: int) -> list[Any]:
    """The rows of several evaluations. All evaluations have the same first ``floors`` rows: the real images."""
    return [row for number, each in enumerate(rows) for row in each[floors * (number > 0) :]]


def _trial_tables(results: SweepResults) -> dict[str, bytes]:
    """All values of the report's rows: the contents of a Parquet file and a CSV file, by file name."""
    frame = pandas.DataFrame([_values(results, row) for row in results.rows], dtype=object)
    columns = {}
    for name in frame:
        try:
            columns[name] = pa.array(frame[name], from_pandas=True)
        except pa.ArrowException:  # values of several types become text
            columns[name] = pa.array(frame[name].map(str, na_action="ignore"), pa.string(), from_pandas=True)
    parquet = io.BytesIO()
    pq.write_table(pa.table(columns), parquet)
    return {"trials.parquet": parquet.getvalue(), "trials.csv": frame.to_csv(index=False).encode()}


def _values(results: SweepResults, row: Row) -> dict[str, Any]:
    """The columns of the Parquet and CSV files. To add a column, add a line here."""
    trial, score = row.trial, row.score
    return {
        "number": trial.number,
        "name": row.name,
        "status": trial.status,
        **trial.values,
        **({"judged_steps": score.steps, "judged_guidance": score.guidance} if score else {}),
        "updates": trial.updates,
        "seconds": trial.seconds,
        "front": results.marks(row),
        **row.metrics,
        **{f"half_width/{name}": value for name, value in (score.half_widths if score else {}).items()},
        "out": trial.out,
        "error": trial.error,
    }


def _answer(spec: AnySweep, results: SweepResults, evaluations: Sequence[str]) -> dict[str, Any]:
    """The content of answer.json, which ``evaluate --from-sweep`` reads."""
    best, path = results.best, files.join(evaluations[0], SPEC_FILE) if evaluations else None
    front = results.on_front if results.fronts else results.ranked[:1]
    answer = {
        "metric": results.metric.name,
        "better": results.metric.better,
        "best": {"name": best.name, "out": best.trial.out, "metrics": dict(best.metrics)} if best else None,
        "front": list(dict.fromkeys(row.trial.out for row in front)),
    }
    if isinstance(spec, TeachSweepSpec):
        return answer
    options = json.loads(files.read_bytes(path))["options"] if path and files.exists(path) else {}
    return {**answer, "teacher": options.get("teacher") or spec.teacher, "store": spec.store}


FRONT = (
    "A trial is on the front if no trial of the same or lower cost is better. Speeds that differ by up to 10 % count "
    "as equal. Trials have the same numbers in the pictures and the tables."
)
SAMPLES = (
    "In each column, noise and label are the same. The top row shows real images of that label; the last rows show the "
    "students' teachers."
)
HEAT_MAPS = "Each cell shows the best trial with its two values. Darker is better; the best cell has a frame."
NO_HEAT_MAPS = "Heat maps are left out: they need finished trials with two or more {}."

PORTRAIT_COLUMNS = 14
"""A table with more columns is printed in landscape format."""


def make_page(spec: AnySweep, results: SweepResults, plots: Mapping[str, Plot], note: str, tracking_uri: str) -> bytes:
    """Return the HTML page. ``plots`` have file names, and ``note`` explains why plots are missing."""

    def drawn(prefix: str, is_wide: bool = False) -> list[str]:
        return [page.picture(*plot, is_wide) for name, plot in plots.items() if name.startswith(prefix)]

    counts, best, *failures = summary_lines(results)
    parts = [page.paragraph(best[0].upper() + best[1:], kind="lead"), page.paragraph(counts)]
    parts += [page.paragraph(failure, kind="note") for failure in failures]
    is_of_teachers, on_front = isinstance(spec, TeachSweepSpec), "the front" if results.fronts else "the best trials"
    if results.on_front and results.fronts:
        parts += [page.heading("Quality against cost"), page.paragraph(FRONT), page.pictures(drawn("front-"))]
        parts.append(_table(results, results.on_front, main_columns(results)))
    if samples := drawn("samples", is_wide=True):
        parts += [page.heading(f"Samples of {on_front}"), page.paragraph(SAMPLES), *samples]
    parts.append(page.heading("Pairs of options" if is_of_teachers else "Steps x guidance"))
    maps = drawn("heat-map-")
    no_maps = NO_HEAT_MAPS.format("values of two options" if is_of_teachers else "step counts and guidance scales")
    parts += [page.paragraph(HEAT_MAPS), page.pictures(maps)] if maps else [page.paragraph(no_maps, kind="note")]
    parts += [page.heading("What the parameters do"), *drawn("parallel-coordinates", is_wide=True)]
    parts += [*drawn("importances"), *([page.paragraph(note, kind="note")] if note else [])]
    all_trials = [page.heading("All trials"), _table(results, ordered_rows(results), results.columns)]
    is_wide = len(table(results, results.rows[:1], results.columns)[0]) > PORTRAIT_COLUMNS
    parts += [page.landscape(all_trials)] if is_wide else all_trials
    parts += [page.paragraph(*provenance(results.record), kind="note")] if results.record else []
    out = spec.out.rstrip("/")  # the command below writes a folder next to the sweep's folder
    models, shown = f"--from-sweep {spec.out}", "the front"
    if is_of_teachers and results.best:
        models, shown = f"--teacher {results.best.trial.out}", "the best teacher"
    command = f"python -m jobs.evaluate {models} --samples 10000 --seeds 5 --out {out}-evaluation"
    parts += [
        page.heading("Next steps"),
        page.paragraph(f"Evaluate {shown} with more samples and confidence intervals. Compare the runs in MLflow."),
        page.listing(f"{command}\n{page.mlflow_command(tracking_uri)}"),
        page.heading("Options"),
        page.listing(json.dumps(spec.model_dump(mode="json"), indent=2)),
    ]
    return page.page(f"DistillKac: sweep {out.rsplit('/', 1)[-1]}", parts)


def _table(results: SweepResults, rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    heads, lines = table(results, rows, metrics)
    text_columns = {heads.index(name) for name in ("trial", "front", "status") if name in heads}
    return page.table(heads, lines, text_columns, [number for number, row in enumerate(rows) if row is results.best])
