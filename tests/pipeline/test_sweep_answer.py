"""What a sweep answers: best, fronts and tables against trials whose order is known, and what is left out and why."""

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from kac.metrics import Metric
from pipeline import tracking
from pipeline.config.specs import SweepSpec
from pipeline.evaluate.scores import read_record
from pipeline.sweep.answer import write_answer
from pipeline.sweep.answer.pictures import parameters
from pipeline.sweep.answer.rows import describe, front, headings, make_rows, ranked
from tests.pipeline.sweeps import MadeTrial, evaluation, grid, search

FRECHET = "frechet_distance_classifier"
ENERGY = Metric("energy_distance", "energy distance of a small sample", "", ".4f", "lower")


def answer(out: Path, trials: list[Any], metric: str = FRECHET, better: str = "lower", judged: bool = True) -> Any:
    """Write the answer; returns the sweep's run in MLflow."""
    finished = [trial for trial in trials if trial.status == "finished"]
    folder = evaluation(out / "evaluation", finished) if judged else None
    spec = SweepSpec(store="/runs/store", out=str(out))
    with tracking.start_run(spec=spec, fingerprint=str(out), inputs={}, output=str(out)) as run:
        write_answer(spec, trials, folder, run, metric, better)
    return MlflowClient().get_run(run.run_id)


def made(number: int, value: float, **values: Any) -> MadeTrial:
    return MadeTrial(number, f"t{number}", f"/o/t{number}", values, metrics={"q": value})


def test_a_grid_is_answered_on_disk_and_in_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trials = grid(tmp_path)
    run = answer(tmp_path, trials)
    scores = [s for s in read_record(str(tmp_path / "evaluation")).scores if s.kind == "student"]
    best = min(scores, key=lambda score: score.metrics[FRECHET])
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
    metrics = read_record(str(tmp_path / "evaluation")).metrics().values()
    assert {f"heat-map-{m.name}" for m in metrics if m.heading and m.name != "nfe"} <= pictures
    printed = capsys.readouterr().out
    assert f"best by FD classifier (lower is better): #{trials_number(trials, best)} {best.name}" in printed
    assert "16 trials: 16 finished" in printed
    assert max(map(len, printed.splitlines()[:20])) < 130


def trials_number(trials: list[Any], score: Any) -> int:
    return next(trial.number for trial in trials if trial.out == score.folder)


def test_both_tables_hold_every_trial_with_what_was_varied_and_measured(tmp_path: Path):
    trials = grid(tmp_path)
    trials[3] = dataclasses.replace(trials[3], status="failed", metrics={}, error="the disk is full")
    answer(tmp_path, trials)
    table = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    lines = list(csv.DictReader(io.StringIO((tmp_path / "trials.csv").read_text())))
    assert len(table) == len(lines) == 16
    by_folder = {score.folder: score for score in read_record(str(tmp_path / "evaluation")).scores}
    for trial, row, line in zip(trials, table, lines, strict=True):
        assert (row["steps"], row["guidance"], row["status"]) == (*trial.values.values(), trial.status)
        if trial.status == "failed":
            assert (row[FRECHET], row["error"]) == (None, "the disk is full")
        else:
            assert row[FRECHET] == by_folder[trial.out].metrics[FRECHET] == float(line[FRECHET])
            assert row["validation/energy_distance"] == trial.metrics["validation/energy_distance"]


def test_the_front_is_what_nothing_beats_at_no_higher_cost():
    values = [(1, 9.0), (1, 8.0), (2, 8.5), (4, 3.0), (4, 3.0), (20, 3.5), (20, 1.0)]
    rows = make_rows([made(n, q, steps=m) for n, (m, q) in enumerate(values)], None)
    low, high = (Metric("q", "", better=better) for better in ("lower", "higher"))  # type: ignore[arg-type]
    cost = Metric("nfe", "", better="lower")
    assert [row.trial.number for row in front(rows, low, cost)] == [1, 3, 6]
    assert [row.trial.number for row in front(rows, high, cost)] == [0]


def test_speeds_that_differ_by_chance_are_one(tmp_path: Path):
    """Of the four trials of a step count, whose speeds are within a few per cent, the best alone is on the front."""
    trials = grid(tmp_path)
    record = read_record(evaluation(tmp_path / "evaluation", trials))
    metric, speed = describe(FRECHET, record, "lower"), describe("images_per_second", record, "higher")
    assert [row.steps for row in front(make_rows(trials, record), metric, speed)] == [1, 2, 4, 20]


def test_a_trial_that_was_stopped_or_failed_is_never_the_best():
    trials = [made(0, 2.0), dataclasses.replace(made(1, 1.0), status="stopped"), made(2, float("nan"))]
    assert [row.trial.number for row in ranked(make_rows(trials, None), Metric("q", "", better="lower"))] == [0]


def test_a_search_without_an_evaluation_is_ranked_by_what_was_reported(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setitem(tracking.METRICS, ENERGY.name, ENERGY)
    trials = search(tmp_path)
    run = answer(tmp_path, trials, "validation/energy_distance", judged=False)
    best = min(t.metrics["validation/energy_distance"] for t in trials if t.status == "finished")
    assert run.data.metrics["best/validation/energy_distance"] == best
    page = (tmp_path / "report.html").read_text()
    assert "32 trials: 22 finished, 10 stopped early" in page
    assert "they need finished trials of two step counts and two guidance scales" in page
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == {"parallel-coordinates", "importances"}


def test_the_parameter_that_matters_is_the_important_one():
    """And words, values that are missing and "all" among numbers are no obstacle."""
    trials = [
        made(n, 10.0 * (n % 4) + 0.1 * (n % 3), steps=n % 4, guidance=[0.0, "all", 1.5][n % 3]) for n in range(24)
    ]
    trials += [made(24, 0.05, steps=0, guidance=0.0, chain="20-4")]
    rows, metric = make_rows(trials, None), Metric("q", "", "q", better="lower")
    drawn, note = parameters(rows, ["steps", "guidance", "chain"], metric)
    assert set(drawn) == {"parallel-coordinates", "importances"}
    assert note == ""


@pytest.mark.parametrize(
    ("trials", "note"),
    [
        ([made(n, n, steps=n) for n in range(3)], "they need 4 finished trials with this metric, found 3"),
        ([made(n, n, steps=1) for n in range(5)], "no parameter differs"),
        ([made(n, n, steps=n) for n in range(5)], "one parameter was varied"),
        ([made(n, 1.0, steps=n, guidance=n % 2) for n in range(5)], "all trials have the same value"),
    ],
)
def test_what_cannot_be_said_of_parameters_is_left_out_with_a_reason(trials: list[Any], note: str):
    assert note in parameters(make_rows(trials, None), ["steps", "guidance"], Metric("q", "", "q", better="lower"))[1]


def test_a_sweep_of_which_nothing_finished_still_has_its_answer(tmp_path: Path):
    failed = [dataclasses.replace(t, status="failed", metrics={}, error="boom") for t in grid(tmp_path, (1,), (0.0,))]
    run = answer(tmp_path, failed, judged=False)
    assert json.loads((tmp_path / "answer.json").read_text())["best"] is None
    assert run.data.metrics == {}
    assert "failed: #0 steps-1-guidance-0.0: boom" in (tmp_path / "table.txt").read_text()


def test_fields_are_called_by_their_last_names_unless_two_have_the_same():
    assert headings(["optimizer.learning_rate", "objective.kind", "seed", "refine.seed"]) == {
        "optimizer.learning_rate": "learning rate",
        "objective.kind": "objective",
        "seed": "seed",
        "refine.seed": "refine.seed",
    }
