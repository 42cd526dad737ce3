"""Whole sweeps: missing students, one parent run, chains, early stops, searches and shared columns."""

import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from ray.tune.search import Searcher

from kac.model import load_config, load_model
from kac.precision import Precision
from kac.util.errors import DistillKacError
from pipeline import store, tracking
from pipeline.config import SweepSpec
from pipeline.distill import distill, plan_student, resolve_spec, start_student_run
from pipeline.store import columns as store_columns
from pipeline.sweep import Ledger, TrialRecord, sweep, sweep_stage
from pipeline.sweep.planned_trials import grid_trials
from pipeline.sweep.proposers import Optuna
from pipeline.sweep.trials import LedgerASHA, LedgerSearch
from pipeline.tracking.killed_runs import mark_killed
from tests.pipeline.stages import FEW, distill_spec, runs_of, weights
from tests.pipeline.stores import make_store


def spec_of(store: str, out: Path, **options: Any) -> SweepSpec:
    return SweepSpec(**{"optimizer": FEW, "samples": 0, **options}, store=store, out=str(out))


def test_a_sweep_trains_missing_students_under_one_parent_run(small_store: str, tmp_path: Path, ray_cluster: None):
    spec = spec_of(small_store, tmp_path / "sweep", steps=(1, 2))
    single = distill(distill_spec(small_store, tmp_path / "single", steps=2))
    first = tmp_path / "sweep" / "steps-1-guidance-0.0"
    distill(distill_spec(small_store, first, steps=1))
    untouched = weights(first)
    records = sweep(spec)
    assert weights(first) == untouched
    assert [(r.name, r.status, r.updates) for r in records] == [
        ("steps-1-guidance-0.0", "finished", 60),
        ("steps-2-guidance-0.0", "finished", 60),
    ]
    assert records[1].seconds > 0 and records[1].metrics["loss"] > 0
    swept = load_config(str(tmp_path / "sweep" / "steps-2-guidance-0.0"))
    assert single is not None and swept.fingerprint == single.fingerprint
    expected = load_model(str(tmp_path / "single")).network.state_dict()
    for name, value in load_model(str(tmp_path / "sweep" / "steps-2-guidance-0.0")).network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    (parent,) = [run for run in runs_of("sweep") if run.data.params["out"] == spec.out]
    children = [r for r in runs_of("distill") if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {tracking.FINGERPRINT_TAG in run.data.tags for run in children} == {True}
    assert len(children) == 2, "the run of a student that was already complete is also a child of the sweep's run"
    assert sweep(spec) == records
    with pytest.raises(DistillKacError, match=r"grid.steps is 1,2, not 1,4"):
        sweep(spec.model_copy(update={"steps": (1, 4)}))


def test_a_failed_trial_fails_the_rest_of_its_chain(small_store: str, tmp_path: Path, ray_cluster: None):
    spec = spec_of(
        small_store, tmp_path, chain=(4, 2, 1), steps=(4,), grid={"optimizer.learning_rate": ["3e-3", "1e30"]}
    )
    spec = spec.model_copy(
        update={"optimizer": FEW.model_copy(update={"max_gradient_norm": 1e30, "warmup_updates": 0})}
    )
    with pytest.raises(DistillKacError, match=r"3 of 6 trials failed: .*1e30: .*loss.*predecessor chain-4-2") as failed:
        sweep(spec)
    assert "`optimizer.learning_rate`" in str(failed.value) and "same command" not in str(failed.value)
    records = {record.name: record for record in Ledger(str(tmp_path)).records}
    assert all(record.has_diverged == (record.status == "failed") for record in records.values())
    assert sum(record.status == "finished" for record in records.values()) == 3
    last = records["chain-4-2-1-guidance-0.0-optimizer-learning-rate-3e-3"]
    predecessor = str(tmp_path / "chain-4-2-guidance-0.0-optimizer-learning-rate-3e-3")
    written = json.loads((Path(last.out) / "spec.json").read_text())
    assert written["options"]["init"] == predecessor
    assert written["identity"]["init_sha256"] == load_config(predecessor).weights_sha256


def test_students_of_a_chain_wait_for_the_retry_of_their_predecessor(tmp_path: Path):
    spec = spec_of("s", tmp_path, chain=(4, 2, 1), steps=(4,))
    planned, ledger = grid_trials(spec), Ledger(spec.out)
    for number, trial in enumerate(planned):
        record = TrialRecord(number=number, name=trial.name, out=trial.spec.out, values=trial.values)
        ledger.put(record.model_copy(update={"status": "failed", "error": "lost"}))
    search = LedgerSearch(spec, ledger, planned, len(planned))
    for trial in planned:
        assert search.suggest(trial.name)["trial"] == trial.name
        assert search.suggest("too early") is (None if trial is not planned[-1] else Searcher.FINISHED)
        search.on_trial_complete(trial.name, {"update": 60, "seconds": 1.0, "is_done": True})
    assert {record.status for record in ledger.records} == {"finished"}


def test_a_failure_in_a_chain_is_logged_once_per_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    spec = spec_of("s", tmp_path, chain=(4, 2, 1), steps=(4,))
    planned, ledger = grid_trials(spec), Ledger(spec.out)
    search = LedgerSearch(spec, ledger, planned, len(planned))
    search.suggest("first")
    search.on_trial_complete("first", error=True)
    assert search.suggest("second") is Searcher.FINISHED
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[1].split(":")[0] for line in lines] == [trial.name for trial in planned]


def test_an_interrupted_sweep_ends_the_runs_of_its_trials(small_store: str, tmp_path: Path):
    """The sweep also ends the runs of trials that have not reported anything yet."""
    ledger, runs = Ledger(str(tmp_path)), []
    for number, status in enumerate(("waiting", "running", "finished")):
        out = tmp_path / status
        student = resolve_spec(distill_spec(small_store, out))
        with suppress(RuntimeError), start_student_run(student, plan_student(student)) as run:
            runs.append(run)
            raise RuntimeError("its process is killed")
        MlflowClient().update_run(run.run_id, "RUNNING")
        ledger.put(TrialRecord(number=number, name=status, out=str(out), values={}, status=status))
    sweep_stage._end_runs(ledger, "waiting", "running")
    runs[-1].flush()
    assert [run.status() for run in runs] == ["KILLED", "KILLED", "RUNNING"]
    runs[-1].end("FAILED")


def test_a_search_runs_its_trials_and_can_be_extended(small_store: str, tmp_path: Path, ray_cluster: None):
    spec = spec_of(
        small_store,
        tmp_path,
        search={"optimizer.learning_rate": "loguniform(1e-4,1e-2)", "steps": "choice(1,2)"},
        trials=3,
        asha_metric="loss",
    )
    first = sweep(spec)
    assert [record.status for record in first] == ["finished"] * 3
    more = sweep(spec.model_copy(update={"trials": 4}))
    assert more[:3] == first and len(more) == 4
    rates = [record.values["optimizer.learning_rate"] for record in more]
    assert len(set(rates)) == 4 and all(1e-4 <= rate <= 1e-2 for rate in rates)
    study = Optuna(spec, Ledger(spec.out)).study
    assert [round(trial.value, 6) for trial in study.trials] == [round(r.metrics["loss"], 6) for r in more]


def test_asha_stops_half_of_a_bad_space_and_keeps_the_best_trial(small_store: str, tmp_path: Path, ray_cluster: None):
    rates = ["3e-3", *(f"{rate}e-7" for rate in range(1, 8))]
    spec = spec_of(
        small_store,
        tmp_path,
        steps=(1,),
        grid={"optimizer.learning_rate": rates},
        optimizer=FEW.model_copy(update={"updates": 200}),
        checkpoint_updates=10,
        asha=True,
        asha_metric="loss",
        grace_updates=20,
        asha_factor=2,
    )
    records = sweep(spec)
    stopped = [record for record in records if record.status == "stopped"]
    assert len(stopped) >= 4
    best = min(records, key=lambda record: record.metrics["loss"])
    assert best.status == "finished" and best.values["optimizer.learning_rate"] == 3e-3
    assert all(record.updates < 200 for record in stopped)
    assert sweep(spec) == records, "stopped trials are not started again"


def test_rungs_include_the_reports_of_an_earlier_start(tmp_path: Path):
    spec = spec_of("/store", tmp_path, asha=True, asha_metric="loss", grace_updates=10, asha_factor=2)
    ledger = Ledger(str(tmp_path))
    for number, loss in enumerate((0.1, 0.2)):
        name = f"trial-{number:04d}"
        ledger.put(TrialRecord(number=number, name=name, out=name, values={}))
        ledger.report(name, {"update": 10, "loss": loss})

    new = SimpleNamespace(trial_id="new", config={"trial": "trial-0002", "updates": 100})
    for earlier, action in ((Ledger(str(tmp_path)), "STOP"), (Ledger(str(tmp_path / "other")), "CONTINUE")):
        scheduler = LedgerASHA(spec, earlier, 100)
        scheduler.on_trial_add(None, new)
        assert scheduler.on_trial_result(None, new, {"update": 10, "loss": 0.3}) == action
        assert scheduler.on_trial_result(None, new, {"update": 100, "loss": 0.3}) == "CONTINUE"


def test_missing_guidance_scales_are_added_first(teacher: str, tmp_path: Path, ray_cluster: None):
    path = str(tmp_path / "store")
    make_store(path, teacher, trajectories=300, shard_size=128, guidance=(0.0,))
    spec = spec_of(path, tmp_path / "sweep", guidance=(0.0, 0.5), steps=(2,), rollout=True, samples=64)
    spec = spec.model_copy(update={"features": ("pixels",)})
    before = {shard: (Path(path) / shard).stat().st_mtime_ns for shard in _shards(path)}
    assert [record.status for record in sweep(spec)] == ["finished"] * 2
    assert store.open(path).guidance == (0.0, 0.5) and store.open(path).rows(0.5) == 300
    assert all((Path(path) / shard).stat().st_mtime_ns == time for shard, time in before.items())
    (parent,) = [run for run in runs_of("sweep") if run.data.params["out"] == spec.out]
    below = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = MlflowClient().search_runs([parent.info.experiment_id], below)
    assert sorted(run.info.run_name for run in children) == ["steps-2-guidance-0.0", "steps-2-guidance-0.5"]
    evaluation = MlflowClient().get_run(parent.data.tags["distillkac.evaluation"])
    assert evaluation.data.tags[tracking.STAGE_TAG] == "evaluate"


def _shards(path: str) -> list[str]:
    return [receipt.name for receipt in store.open(path).manifest.shards]


def test_the_workers_of_a_trial_may_use_the_whole_cluster(small_store: str, tmp_path: Path, ray_cluster: None):
    (record,) = sweep(spec_of(small_store, tmp_path, steps=(2,), workers=2))
    assert (record.status, record.updates) == ("finished", 60)
    assert record.metrics["validation/energy_distance"] != record.metrics["loss"] > 0


def test_resources_that_the_cluster_lacks_are_refused(small_store: str, tmp_path: Path, ray_cluster: None):
    for options, message in (
        ({"cpus_per_trial": 3}, r"`cpus_per_trial`.* 1 x \(3 CPU\)"),
        ({"gpus_per_trial": 0.25}, r"`gpus_per_trial`.* 1 x \(1 CPU, 0.25 GPU\)"),
        ({"workers": 4}, r"`workers`.* 4 x \(1 CPU\).* 2"),
        ({"label_selector": {"market": "spot"}}, "1 x .1 CPU .*market=spot"),
    ):
        with pytest.raises(DistillKacError, match=message):
            sweep(spec_of(small_store, tmp_path, steps=(1,), **options))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_batches_of_shared_columns_are_bitwise_equal(small_store: str, steps: int):
    def batches() -> list[Any]:
        source = store.open(small_store)
        objective = distill_spec(small_store, Path("x")).objective.build(steps)
        intervals = source.interval_batches(64, objective, 1.0, seed=3)
        whole = source.batches(100, 1.0, knots=(4, 0), seed=1)
        return [next(intervals) for _ in range(8)] + list(whole)

    expected = batches()
    source = store.open(small_store)
    (selection,) = store_columns.merge_selections(
        [source.selection(distill_spec(small_store, Path("x")).objective.build(m), 1.0) for m in (1, 2, 4)]
    )
    shared = store_columns.load(selection)
    for array in (shared.knots, shared.label, shared.guidance):
        array.setflags(write=False)
    with store_columns.use_shared([shared]):
        batches_of_shared = batches()
        two_steps = distill_spec(small_store, Path("x")).objective.build(2)
        assert store_columns.load(source.selection(two_steps, 1.0)).knots is shared.knots
        assert store_columns.load(source.selection(two_steps, 0.0)).knots is not shared.knots
    for batch, other in zip(expected, batches_of_shared, strict=True):
        for left, right in zip(batch, other, strict=True):
            assert (left is None and right is None) or torch.equal(left, right)


def test_reruns_keep_a_student_and_its_one_run(
    small_store: str, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    """A ``precision.dtype`` of auto must not depend on whether the driver has a GPU."""
    spec = spec_of(small_store, tmp_path / "sweep", steps=(1,), gpus_per_trial=0, metric="loss")
    spec = spec.model_copy(update={"precision": Precision(dtype="auto")})
    (first,) = sweep(spec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (again,) = sweep(spec.model_copy(update={"metric": "validation/energy_distance"}))
    assert (again.status, again.seconds) == ("finished", first.seconds), "the trial was complete"
    result = tmp_path / "sweep" / "trials.json"
    result.unlink()
    (tmp_path / "sweep" / "trials" / f"{first.name}.json").unlink()
    sweep(spec)
    # This is the state after an interrupt between the end of the student and the end of the trial.
    Ledger(spec.out).change(first.name, status="running")
    mark_killed(tracking.run_of_output(first.out))
    result.unlink()
    sweep(spec)
    (record,) = Ledger(spec.out).records
    assert record.status == "finished"
    children = [run for run in runs_of("distill") if run.data.params["out"] == record.out]
    assert [run.info.status for run in children] == ["FINISHED"]
    assert len([run for run in runs_of("sweep") if run.data.params["out"] == spec.out]) == 1
