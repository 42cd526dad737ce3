"""Outputs: a folder belongs to one spec, is finished or resumed, and refuses a different spec."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from kac.model import load_config
from kac.util.errors import DistillKacError
from kac.util.fingerprint import hashed_fields
from pipeline import claims, outputs, tracking
from pipeline.distill import distill
from pipeline.teach import teach
from pipeline.tracking.killed_runs import mark_killed
from tests.pipeline.stages import DIVERGING, FEW, distill_spec, teach_spec, weights


@pytest.mark.parametrize("stage", ["teach", "distill"])
def test_a_complete_folder_stays_unchanged_and_a_different_spec_is_refused(
    stage: str, tmp_path: Path, small_store: str, capsys: pytest.CaptureFixture[str]
):
    stages: dict[str, Callable[..., Any]] = {
        "teach": lambda **options: teach(teach_spec(tmp_path / "out", **options)),
        "distill": lambda **options: distill(distill_spec(small_store, tmp_path / "out", **options)),
    }
    stages[stage]()
    before = weights(tmp_path / "out")
    stages[stage]()
    assert "is complete: nothing to do" in capsys.readouterr().out
    with pytest.raises(DistillKacError, match=r"another spec .*seed is 0, not 1"):
        stages[stage](seed=1)
    assert weights(tmp_path / "out") == before


@pytest.mark.parametrize("stage", ["teach", "distill"])
def test_a_rerun_finishes_the_run_of_a_job_that_was_stopped_after_its_model(
    stage: str, tmp_path: Path, small_store: str
):
    """This happens if SIGTERM arrives, or the head node is lost, while a student is uploaded to MLflow."""
    out = tmp_path / "out"
    make = {"teach": lambda: teach(teach_spec(out)), "distill": lambda: distill(distill_spec(small_store, out))}[stage]
    config = make()
    run, client = tracking.run_of_output(str(out)), MlflowClient()
    assert config is not None and run is not None and run.status() == "FINISHED"
    mark_killed(run)
    run.flush()
    for name in ("distillkac.weights_sha256", "distillkac.path"):
        client.delete_tag(run.run_id, name)
    (out / "training").mkdir()
    (out / "training" / "state.pt").touch()
    assert make() == config
    run.flush()
    made = client.get_run(run.run_id)
    assert (made.info.status, made.data.tags["distillkac.path"]) == ("FINISHED", str(out))
    assert made.data.tags["distillkac.weights_sha256"] == config.weights_sha256
    assert not (out / "training").exists()
    models = client.search_logged_models([made.info.experiment_id], f"source_run_id = '{run.run_id}'")
    assert len(models) == (stage == "distill")


def test_after_a_divergence_a_different_spec_can_use_the_folder(tmp_path: Path):
    """The folder has no checkpoint, so the user can follow the error's advice."""
    with pytest.raises(DistillKacError, match=r"`optimizer.learning_rate`"):
        teach(teach_spec(tmp_path / "out", optimizer=DIVERGING))
    gentler = teach_spec(tmp_path / "out")
    assert teach(gentler).fingerprint == load_config(str(tmp_path / "out")).fingerprint
    assert json.loads((tmp_path / "out" / "spec.json").read_text())["options"]["optimizer"]["learning_rate"] == 3e-3


def test_after_a_divergence_on_workers_a_different_spec_can_use_the_folder(tmp_path: Path, ray_cluster: None):
    """Ray Train keeps records of a run without a checkpoint, and resumes a run of the same name from these records."""
    with pytest.raises(DistillKacError, match=r"`optimizer.learning_rate`"):
        teach(teach_spec(tmp_path / "out", optimizer=DIVERGING, workers=1))
    teach(teach_spec(tmp_path / "out", workers=1))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "run.json",
        "spec.json",
    ]


@pytest.mark.parametrize("left", ["training/state.pt", "training/checkpoint_0/state.pt", "model.safetensors"])
def test_a_folder_with_work_of_a_different_spec_is_refused(left: str, tmp_path: Path):
    spec = teach_spec(tmp_path)
    assert outputs.begin(str(tmp_path), spec, "config.json")
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_bytes(b"work")
    assert outputs.begin(str(tmp_path), spec, "config.json")
    with pytest.raises(DistillKacError, match=r"another spec \(seed is 0, not 3\)"):
        outputs.begin(str(tmp_path), teach_spec(tmp_path, seed=3), "config.json")
    assert (tmp_path / left).read_bytes() == b"work"


def test_a_run_file_does_not_count_as_work(tmp_path: Path):
    assert outputs.begin(str(tmp_path), teach_spec(tmp_path), "config.json")
    (tmp_path / "run.json").write_text('{"tracking_uri": "http://gone", "run_id": "1", "fingerprint": "another"}')
    assert outputs.begin(str(tmp_path), teach_spec(tmp_path, seed=3), "config.json")


def test_a_job_does_not_write_into_a_folder_that_another_job_took_over(tmp_path: Path):
    slow = teach_spec(tmp_path)
    outputs.begin(str(tmp_path), slow, "config.json")
    outputs.check_owner(str(tmp_path), slow.fingerprint())
    outputs.begin(str(tmp_path), teach_spec(tmp_path, seed=3), "config.json")
    with pytest.raises(DistillKacError, match="taken over"):
        outputs.check_owner(str(tmp_path), slow.fingerprint())


def test_unhashed_options_can_change(tmp_path: Path):
    spec = teach_spec(tmp_path / "out")
    teach(spec)
    before = weights(tmp_path / "out")
    teach(spec.model_copy(update={"checkpoint_updates": 7}))
    assert weights(tmp_path / "out") == before
    assert FEW.updates == 60


def test_a_second_start_with_the_same_spec_keeps_the_records_of_the_first(tmp_path: Path):
    """The first start may still be running and may not have saved a checkpoint."""
    spec = teach_spec(tmp_path)
    outputs.begin(str(tmp_path), spec, "config.json")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "records.json").write_bytes(b"of Ray Train")
    assert outputs.begin(str(tmp_path), spec, "config.json")
    assert (tmp_path / "training" / "records.json").exists()
    assert outputs.begin(str(tmp_path), teach_spec(tmp_path, seed=3), "config.json")
    assert not (tmp_path / "training").exists()


def test_a_job_that_waited_for_a_folder_finds_the_result_of_the_other_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The other job finishes between the first look into the folder and the claim."""
    other, take = teach_spec(tmp_path / "other"), claims.take
    teach(other)

    def finish_first(out: str) -> None:
        shutil.copytree(other.out, out, dirs_exist_ok=True)
        take(out)

    monkeypatch.setattr(claims, "take", finish_first)
    content = json.loads((tmp_path / "other" / "spec.json").read_text())["identity"]
    content = {name: value for name, value in content.items() if name not in hashed_fields(other)}
    same = teach_spec(tmp_path / "same")
    assert not outputs.begin(same.out, same, "config.json", **content)
    assert not claims.token_of(same.out)
    different = teach_spec(tmp_path / "different", seed=1)
    with pytest.raises(DistillKacError, match="belongs to another spec"):
        outputs.begin(different.out, different, "config.json", **content)
    assert not claims.token_of(different.out)
    assert not (tmp_path / "different" / "claim.json").exists()
