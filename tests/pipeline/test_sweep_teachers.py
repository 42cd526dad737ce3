"""Sweeps of teachers: their trials, runs, budgets, evaluations and reports, and refused options."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.parsing import parse
from kac.model import load_model
from kac.util.errors import ArgumentError, DistillKacError
from pipeline.config import SweepSpec, TeachSweepSpec
from pipeline.sweep import Ledger, TrialRecord, sweep, teacher_trials
from pipeline.sweep.planned_trials import grid_trials, identity
from pipeline.sweep.sweep_results import SweepResults, text_table
from pipeline.sweep.teacher_trials import TeacherTrials, updates_within
from pipeline.sweep.trials import LedgerSearch
from pipeline.teach import teach
from tests.pipeline.stages import FEW, SMALL, runs_of, teach_spec, weights
from tests.pipeline.sweeps import trial_record


def spec_of(out: Path | str = "/out", **options: Any) -> TeachSweepSpec:
    small = {"data": "moons", "network": SMALL, "optimizer": FEW, "samples": 0}
    return TeachSweepSpec(**{**small, **options}, out=str(out))


def test_each_point_of_the_grid_is_a_teacher_named_after_its_values():
    spec = spec_of(grid=["path.a=9,25", "path.c=2,5", "data.horizontal-flip=False"], seed=4, label_dropout=0.3)
    trials = grid_trials(spec)
    assert [trial.name for trial in trials][-1] == "path-a-25-path-c-5-data-horizontal-flip-False"
    assert [(trial.spec.path.a, trial.spec.path.c) for trial in trials] == [(9, 2), (9, 5), (25, 2), (25, 5)]
    for trial in trials:
        shared = (trial.spec.seed, trial.spec.label_dropout, trial.spec.optimizer, trial.spec.data.kind)
        assert shared == (4, 0.3, FEW, "moons") and trial.spec.out == f"/out/{trial.name}"


def test_sweeps_of_students_keep_their_fingerprints():
    """Finished and unfinished sweeps of students stay valid."""
    spec = SweepSpec(store="s", out="o", steps=(1, 2), grid={"optimizer.learning-rate": ["1e-3"]}, chain=(4, 2), seed=3)
    assert spec.fingerprint(store="x", **identity(spec)).startswith("628230107d5f2c790f0b")


def test_a_sweep_trains_and_evaluates_teachers_under_one_parent_run(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "sweep"
    spec = spec_of(
        out, grid=["path.a=9,25", "optimizer.updates=20,60"], samples=64, features=("pixels",), register="best-teacher"
    )
    single = teach(teach_spec(tmp_path / "single", path={"a": 25}))
    records = sweep(spec)
    assert [(record.status, record.updates) for record in records] == [("finished", n) for n in (20, 60, 20, 60)]
    assert single is not None
    (same,) = [record for record in records if record.values == {"path.a": 25, "optimizer.updates": 60}]
    found, expected = (load_model(path).network.state_dict() for path in (same.out, str(tmp_path / "single")))
    for name, value in expected.items():  # trials may use fewer threads than this process, which changes the rounding
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
    (parent,) = [run for run in runs_of("sweep") if run.data.params["out"] == str(out)]
    children = [run for run in runs_of("teach") if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} == {record.name for record in records}
    assert all(run.data.metrics["frechet_distance_pixels"] > 0 for run in children), "the runs get the evaluations"

    answer, printed = json.loads((out / "answer.json").read_text()), capsys.readouterr().out
    rows = {row["name"]: float(row["frechet_distance_pixels"]) for row in csv.DictReader((out / "trials.csv").open())}
    assert set(rows) == {record.name for record in records}
    assert rows[answer["best"]["name"]] == min(rows.values())
    assert f"{answer['best']['name']} with" in printed and "in 100 network evaluations" in printed
    assert "best after 20 updates: #" in printed and "best after 60 updates: #" in printed
    pictures = {path.stem for path in (out / "pictures").iterdir()}
    assert {"front-updates", "heat-map-frechet_distance_pixels", "samples"} <= pictures
    assert "ratio" not in (out / "table.txt").read_text()

    before = {record.out: weights(record.out) for record in records}
    assert sweep(spec) == records
    assert "nothing to do" in capsys.readouterr().out
    sweep(spec.model_copy(update={"solver_steps": 10, "knot_grid": "quadratic", "time_factor": 0.9}))
    assert "in 10 network evaluations" in capsys.readouterr().out, "only the evaluation is repeated"
    for file in (out / "evaluation").glob("*/spec.json"):
        options = json.loads(file.read_text())["options"]
        assert (options["knot_grid"], options["time_factor"]) == ("quadratic", 0.9)
    assert {record.out: weights(record.out) for record in records} == before

    older = json.loads((out / "trials.json").read_text())
    del older["judged"]["knot_grid"], older["judged"]["time_factor"]
    (out / "trials.json").write_text(json.dumps(older))
    assert sweep(spec.model_copy(update={"solver_steps": 10})) == records
    assert "nothing to do" in capsys.readouterr().out, "an older version used the default grid and time factor"
    with pytest.raises(DistillKacError, match=r"grid.path.a is 9,25, not 9"):
        sweep(spec.model_copy(update={"grid": {"path.a": (9,)}}))


def test_a_search_with_early_stopping_trains_teachers(tmp_path: Path, ray_cluster: None):
    spec = spec_of(
        tmp_path,
        search={"path.a": "loguniform(1,100)", "path.clock": "choice(linear,quadratic)"},
        trials=3,
        asha=True,
        asha_metric="loss",
        grace_updates=20,
        checkpoint_updates=20,
    )
    records = sweep(spec)
    assert len(records) == 3 and {record.status for record in records} <= {"finished", "stopped"}
    assert sweep(spec) == records
    assert sweep(spec.model_copy(update={"trials": 4}))[:3] == records


def test_a_budget_of_seconds_becomes_the_updates_of_the_trials_record(tmp_path: Path, ray_cluster: None):
    spec = spec_of(tmp_path, grid=["path.a=9,25"], budget_seconds=0.02)
    records = sweep(spec)
    for record in records:
        assert record.status == "finished" and record.updates == record.values["optimizer.updates"] >= 1
        options = json.loads((Path(record.out) / "spec.json").read_text())["options"]
        assert options["optimizer"]["updates"] == record.updates
    (tmp_path / "trials.json").unlink()
    assert sweep(spec) == records


def test_an_unfinished_trial_keeps_its_measured_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = spec_of(tmp_path, grid=["path.a=9,25"], budget_seconds=60)
    kind, ledger, planned = TeacherTrials(spec), Ledger(spec.out), grid_trials(spec)
    search = LedgerSearch(spec, ledger, planned, len(planned))
    search.suggest("first")
    monkeypatch.setattr(teacher_trials, "updates_within", lambda spec, seconds: 123)
    assert kind.measured_updates(planned[0].spec) == 123
    search.on_trial_result("first", {"measured_updates": 123})
    monkeypatch.setattr(teacher_trials, "updates_within", lambda spec, seconds: 456)
    assert kind.measured_updates(planned[0].spec) == 123, "a restarted process does not measure again"
    updates = [kind.replan(trial, Ledger(spec.out)).spec.optimizer.updates for trial in planned]
    assert updates == [123, FEW.updates], "a restarted sweep does not measure again"


def test_the_updates_of_a_budget_are_proportional_to_its_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            self.now += 0.5
            return self.now

    monkeypatch.setattr(teacher_trials, "time", Clock())
    assert [updates_within(teach_spec(tmp_path), seconds) for seconds in (0.1, 5, 60)] == [1, 10, 120]


def results_of(spec: TeachSweepSpec, values: list[tuple[float, float, int]]) -> SweepResults:
    """Results of trials with values of path.a and path.c, and a number of updates. Later trials are better."""
    trials: list[TrialRecord] = []
    for a, c, updates in values:
        number = len(trials)
        point = {"path.a": a, "path.c": c, "optimizer.updates": updates}
        metrics = {"q": 10.0 - number}
        trials.append(trial_record(number, f"t{number}", f"/o/t{number}", point, metrics=metrics, updates=updates))
    return SweepResults(trials, None, "q", "lower", spec)


def test_a_report_names_the_best_teacher_of_each_budget():
    values = [(a, c, updates) for updates in (60, 240) for a in (9, 25) for c in (2, 5)]
    results = results_of(spec_of(grid=["path.a=9"]), values)
    assert {updates: row.trial.number for updates, row in results.best_by_updates().items()} == {60: 3, 240: 7}
    assert [row.trial.number for row in results.on_front] == [3, 7]
    assert ("path.a", "path.c") in results.planes and len(results.planes) == 3
    assert "best after 60 updates: #3" in text_table(results)


def test_measured_updates_are_no_axis_of_a_report():
    values = [(9, 2, 101), (9, 5, 97), (25, 2, 104), (25, 5, 99)]
    results = results_of(spec_of(grid=["path.a=9"], budget_seconds=1), values)
    assert results.planes == [("path.a", "path.c")] and not results.fronts and not results.best_by_updates()
    assert results.on_front == results.ranked, "samples of the best teachers are shown"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^`grid` or `search` is required"),
        ({"grid": ["pat.a=1"]}, "^pat.a .*Did you mean path"),
        ({"grid": ["steps=1,2"]}, "^steps is not a field"),
        ({"grid": ["path.kind=wave"]}, "^`path.kind`"),
        ({"grid": ["data=moons,digits"]}, "the data"),
        ({"grid": ["path.a=9"], "metric": "frechet_ratio_pixels", "samples": 9}, "^`metric` is frechet_ratio_pixels"),
        ({"grid": ["path.a=9"], "asha_metric": "validation/endpoint_error"}, "^`asha_metric`"),
        ({"grid": ["path.a=9"], "network": "unet"}, "network|patch|shape"),
        ({"grid": ["optimizer.updates=1,2"], "budget_seconds": 1}, "^`budget_seconds` .*optimizer.updates"),
        ({"grid": ["path.a=9"], "budget_seconds": 1, "workers": 1}, "^`budget_seconds` .*`workers`"),
        ({"grid": ["guide_updates=9"], "budget_seconds": 1}, "^`budget_seconds` .*`guide_updates`"),
        (
            {"grid": ["path.a=9"], "metric": "frechet_distance_pixels_to_held_out", "samples": 9},
            "^`metric` is frechet_distance_pixels_to_held_out",
        ),
        ({"grid": ["path.a=9"], "budget_seconds": 0}, "^`budget_seconds`"),
        ({"grid": ["path.a=9"], "store": "s"}, "store"),
    ],
)
def test_invalid_options_are_refused_in_one_line_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(DistillKacError, match=message) as error:
        sweep(spec_of(tmp_path / "out", **options))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_teach_section_of_a_recipe_gives_the_fixed_options():
    words = ["--config", "digits", "--grid", "path.c=2,3", "--out", "o", "--optimizer.updates", "7"]
    spec = parse(TeachSweepSpec, words, "sweep")
    assert (spec.optimizer.updates, spec.optimizer.batch_size) == (7, 1024)
    with pytest.raises(ArgumentError, match="--rollout is unknown"):
        parse(TeachSweepSpec, [*words, "--rollout"], "sweep")
