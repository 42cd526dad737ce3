"""The report of a sweep: the best trial, fronts, tables and plots, and notes on missing plots."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from kac.metrics import Metric
from pipeline import tracking
from pipeline.config import SweepSpec
from pipeline.evaluate.scores import read_record
from pipeline.sweep import TrialRecord
from pipeline.sweep.sweep_plots import parameter_plots
from pipeline.sweep.sweep_report import write_report
from pipeline.sweep.sweep_results import COSTS, SweepResults, front, headings, make_rows, ranked
from tests.pipeline.sweeps import evaluation, grid, search, trial_record

FRECHET = "frechet_distance_classifier"
ENERGY = Metric("energy_distance", "energy distance of a small sample", "", ".4f", "lower")


def report_run(
    out: Path, trials: list[Any], metric: str = FRECHET, better: str = "lower", is_evaluated: bool = True
) -> Any:
    """Write the report, and return the sweep's run in MLflow."""
    finished = [trial for trial in trials if trial.status == "finished"]
    folders = [evaluation(out / "evaluation", finished)] if is_evaluated else []
    spec = SweepSpec(store="/runs/store", out=str(out))
    with tracking.start_run(spec=spec, fingerprint=str(out), inputs={}, output=str(out)) as run:
        write_report(spec, trials, folders, run, metric, better)
    return MlflowClient().get_run(run.run_id)


def trial_of(number: int, value: float, **values: Any) -> TrialRecord:
    return trial_record(number, f"t{number}", f"/o/t{number}", values, metrics={"q": value})


def failed(record: TrialRecord, error: str) -> TrialRecord:
    return record.model_copy(update={"status": "failed", "metrics": {}, "error": error})


def test_the_report_of_a_grid_is_on_disk_and_in_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trials = grid(tmp_path)
    trials[3] = failed(trials[3], "the disk is full")
    run = report_run(tmp_path, trials)
    record = read_record(str(tmp_path / "evaluation"))
    by_folder = {score.folder: score for score in record.scores}
    best = min((by_folder[t.out] for t in trials if t.out in by_folder), key=lambda score: score.metrics[FRECHET])
    found = json.loads((tmp_path / "answer.json").read_text())
    assert (found["best"]["name"], found["metric"], found["teacher"]) == (best.name, FRECHET, "/runs/teacher")
    assert best.folder in found["front"]
    assert run.data.metrics[f"best/{FRECHET}"] == best.metrics[FRECHET]
    assert run.data.metrics["best/nfe"] == best.steps
    assert run.data.tags["distillkac.best"] == best.name
    files = {file.path for file in MlflowClient().list_artifacts(run.info.run_id)}
    assert files == {"answer.json", "pictures", "report.html", "table.txt", "trials.csv", "trials.parquet"}
    pictures = {Path(file.path).stem for file in MlflowClient().list_artifacts(run.info.run_id, "pictures")}
    assert pictures >= {"front-nfe", "front-images_per_second", "samples", "parallel-coordinates", "importances"}
    metrics = [metric for metric in record.metrics().values() if metric.heading]
    assert {f"heat-map-{metric.name}" for metric in metrics if metric.name != "nfe"} <= pictures
    columns = (tmp_path / "report.html").read_text().split("All trials")[1].count("</th>")
    assert columns == len(metrics) + 9, "several metrics may share a heading"
    printed = capsys.readouterr().out
    number = next(trial.number for trial in trials if trial.out == best.folder)
    assert f"best by FD classifier (lower is better): #{number} {best.name}" in printed
    assert "16 trials: 15 finished, 1 failed" in printed
    assert max(map(len, printed.splitlines()[:20])) < 130

    table = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    lines = list(csv.DictReader(io.StringIO((tmp_path / "trials.csv").read_text())))
    for trial, row, line in zip(trials, table, lines, strict=True):
        assert (row["steps"], row["guidance"], row["status"]) == (*trial.values.values(), trial.status)
        if trial.status == "failed":
            assert (row[FRECHET], row["error"]) == (None, "the disk is full")
        else:
            assert row[FRECHET] == by_folder[trial.out].metrics[FRECHET] == float(line[FRECHET])
            assert row["validation/energy_distance"] == trial.metrics["validation/energy_distance"]


def test_no_row_of_the_same_or_lower_cost_beats_a_row_of_the_front():
    values = [(1, 9.0), (1, 8.0), (2, 8.5), (4, 3.0), (4, 3.0), (20, 3.5), (20, 1.0)]
    rows = make_rows([trial_of(n, q, steps=m) for n, (m, q) in enumerate(values)], None)
    for better, expected in (("lower", [1, 3, 6]), ("higher", [0])):
        best_first = ranked(rows, Metric("q", "", better=better))  # type: ignore[arg-type]
        assert [row.trial.number for row in front(best_first, COSTS[0])] == expected


def test_speeds_within_measurement_error_count_as_equal(tmp_path: Path):
    """Four trials per step count differ in speed by a few per cent. Only the best of them is on the front."""
    trials = grid(tmp_path)
    results = SweepResults(trials, read_record(evaluation(tmp_path / "evaluation", trials)), FRECHET, "lower")
    for rows in results.fronts.values():
        assert [row.values["steps"] for row in rows] == [1, 2, 4, 20]


def test_a_stopped_or_failed_trial_is_never_the_best():
    stopped, diverged = {"status": "stopped"}, {"metrics": {"q": float("nan")}}
    trials = [
        trial_of(0, 2.0),
        trial_of(1, 1.0).model_copy(update=stopped),
        trial_of(2, 0.0).model_copy(update=diverged),
    ]
    assert [row.trial.number for row in ranked(make_rows(trials, None), Metric("q", "", better="lower"))] == [0]


def test_a_search_without_an_evaluation_is_ranked_by_reported_metrics(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setitem(tracking.METRICS, ENERGY.name, ENERGY)
    trials = search(tmp_path)
    run = report_run(tmp_path, trials, "validation/energy_distance", is_evaluated=False)
    best = min(t.metrics["validation/energy_distance"] for t in trials if t.status == "finished")
    assert run.data.metrics["best/validation/energy_distance"] == best
    page = (tmp_path / "report.html").read_text()
    assert "32 trials: 22 finished, 10 stopped early" in page
    assert "Heat maps are left out" in page
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == {"parallel-coordinates", "importances"}


def test_parameters_are_plotted_with_text_and_missing_values():
    """A field may mix numbers with text such as "all", and may have no value in some trials."""
    trials = [
        trial_of(n, 10.0 * (n % 4) + 0.1 * (n % 3), steps=n % 4, guidance=[0.0, "all", 1.5][n % 3]) for n in range(24)
    ]
    trials += [trial_of(24, 0.05, steps=0, guidance=0.0, chain="20-4")]
    drawn, note = parameter_plots(SweepResults(trials, None, "q", "lower"))
    assert set(drawn) == {"parallel-coordinates", "importances"}
    assert note == ""


@pytest.mark.parametrize(
    ("trials", "note"),
    [
        ([trial_of(n, n, steps=n) for n in range(3)], "need 4 finished trials"),
        ([trial_of(n, n, steps=1) for n in range(5)], "a parameter that differs"),
        ([trial_of(n, n, steps=n) for n in range(5)], "need two parameters"),
        ([trial_of(n, 1.0, steps=n, guidance=n % 2) for n in range(5)], "different values"),
    ],
)
def test_missing_plots_of_parameters_have_a_note(trials: list[Any], note: str):
    assert note in parameter_plots(SweepResults(trials, None, "q", "lower"))[1]


def test_a_sweep_without_finished_trials_has_a_report(tmp_path: Path):
    trials = [failed(record, "boom") for record in grid(tmp_path, (1,), (0.0,))]
    run = report_run(tmp_path, trials, is_evaluated=False)
    assert json.loads((tmp_path / "answer.json").read_text())["best"] is None
    assert run.data.metrics == {}
    assert "failed: #0 steps-1-guidance-0.0: boom" in (tmp_path / "table.txt").read_text()


def test_headings_are_the_last_part_of_a_name_unless_two_fields_share_it():
    assert headings(["optimizer.learning_rate", "objective.kind", "seed", "refine.seed"]) == {
        "optimizer.learning_rate": "learning rate",
        "objective.kind": "objective",
        "seed": "seed",
        "refine.seed": "refine.seed",
    }
