"""The split and the class names of a dataset reach MLflow, students, samples and reports."""

import html
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from kac.data import DataConfig, open_dataset
from kac.model import load_config
from kac.util.errors import DistillKacError
from pipeline.config import EvaluateSpec, RolloutSpec, SampleSpec
from pipeline.distill import distill
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.evaluate.scores import read_record
from pipeline.report.evaluation_page import write_evaluation_page
from pipeline.rollout import rollout
from pipeline.sample import sample
from pipeline.teach import teach
from pipeline.tracking import TrackedRun
from pipeline.tracking.logged_models import model_of_run
from pipeline.training import validation
from pipeline.training.validation import ENERGY_DISTANCE
from tests.kac.data import making
from tests.pipeline.stages import distill_spec, metrics_of, run_of, teach_spec

NAMES = ("1", "2", "10")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Images in folders 1, 2 and 10 of train and test."""
    root = tmp_path_factory.mktemp("images")
    pixels, labels = making.pixels(36, 1, 4), np.arange(36) % 3
    making.write_folder(root / "train", pixels[:24], labels[:24], names=NAMES)
    making.write_folder(root / "test", pixels[24:], labels[24:], names=NAMES)
    return DataConfig(kind="folder", root=str(root))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, images: DataConfig, tracking_database: str) -> dict[str, str]:
    """A teacher, its store and a student."""
    folder = tmp_path_factory.mktemp("models")
    paths = {name: str(folder / name) for name in ("teacher", "store", "student")}
    teach(teach_spec(folder / "teacher", data=images))
    options: dict[str, Any] = {"trajectories": 64, "knots": 4, "solver_steps": 8, "shard_size": 32, "actors": 0}
    rollout(RolloutSpec(teacher=paths["teacher"], store=paths["store"], **options))
    distill(distill_spec(paths["store"], folder / "student"))
    return paths


@pytest.mark.parametrize("dry_run", [True, False])
def test_teach_prints_the_split(images: DataConfig, tmp_path: Path, dry_run: bool, capsys: pytest.CaptureFixture[str]):
    for _ in range(2):  # the second time, the data is decoded and the teacher complete
        teach(teach_spec(tmp_path / "out", data=images, dry_run=dry_run))
        lines = capsys.readouterr().out.splitlines()
        split = next(line for line in lines if line.startswith("teach: folder: "))
        for part in ("24 training and 12 held-out", "train/ (24 images)", "test/ (12 images)"):
            assert part in split
        assert "teach: classes, label=name: 0=1, 1=2, 2=10" in lines


def test_teach_prints_the_split_of_data_without_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    teach(teach_spec(tmp_path / "out", dry_run=True))
    assert "teach: moons: 3,278 training and 818 held-out images" in capsys.readouterr().out


def test_a_warning_about_the_files_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    batches = making.cifar_batches(making.pixels(60, 3, 32), np.arange(60) % 10)
    archive = making.write_archive(tmp_path / "cifar-10-python.tar.gz", batches)
    teach(teach_spec(tmp_path / "out", data=DataConfig(kind="cifar10", root=str(archive)), dry_run=True))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("teach: warning: ")]
    assert str(archive) in line


def test_models_and_their_runs_keep_the_class_names(models: dict[str, str], images: DataConfig):
    for name in ("teacher", "student"):
        assert load_config(models[name]).class_names == NAMES
    run = run_of("teach", load_config(models["teacher"]).fingerprint)
    assert run.data.tags["distillkac.data.classes"] == "0=1, 1=2, 2=10"
    assert "train/ (24 images)" in run.data.tags["distillkac.data.split"]
    path = MlflowClient().download_artifacts(run.info.run_id, "data.json")
    assert json.loads(Path(path).read_text()) == open_dataset(images).description.model_dump(mode="json")


def test_a_logged_student_has_the_class_names(models: dict[str, str], tracking_database: str):
    run = run_of("distill", load_config(models["student"]).fingerprint)
    model = model_of_run(TrackedRun(tracking_database, run.info.run_id))
    assert model is not None
    info = mlflow.models.get_model_info(model.model_uri)
    assert info.metadata["class_names"] == list(NAMES)


def test_samples_can_have_class_names(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sample(SampleSpec(model=models["student"], out=str(tmp_path / "s.npz"), count=4, labels=("10", 1)))
    with np.load(tmp_path / "s.npz", allow_pickle=False) as found:
        assert found["labels"].tolist() == [2, 0, 2, 0]
        assert found["class_names"].tolist() == list(NAMES)
    assert "sample: classes, label=name: 0=1, 1=2, 2=10" in capsys.readouterr().out.splitlines()
    for word in ("0", "3", "cat"):
        with pytest.raises(DistillKacError, match=f"`labels`.*{word}"):
            sample(SampleSpec(model=models["student"], out=str(tmp_path / "x.npz"), labels=(word,)))
    assert not (tmp_path / "x.npz").exists()


def test_an_evaluation_and_its_report_show_the_class_names(models: dict[str, str], tmp_path: Path):
    out, page = tmp_path / "evaluation", tmp_path / "report.html"
    spec = EvaluateSpec(teacher=models["teacher"], students=(models["student"],), out=str(out), samples=20, actors=0)
    evaluate(spec.model_copy(update={"features": ("pixels",), "solver_steps": 8}))
    record = read_record(str(out))
    assert record.class_names == NAMES
    assert len(record.shown_labels) == 12
    assert "classes, label=name: 0=1, 1=2, 2=10" in (out / "table.txt").read_text().splitlines()
    write_evaluation_page(str(page), "t", str(out), {}, "sqlite:///m.db")
    columns = ", ".join(f"{label} {NAMES[label]}" for label in record.shown_labels)
    assert html.escape(f"Classes from left to right: {columns}.") in page.read_text()


def test_an_evaluation_of_an_older_version_can_be_reported(models: dict[str, str], tmp_path: Path):
    out, page = tmp_path / "evaluation", tmp_path / "report.html"
    spec = EvaluateSpec(teacher=models["teacher"], out=str(out), samples=20, actors=0, features=("pixels",))
    evaluate(spec.model_copy(update={"solver_steps": 8}))
    values = json.loads((out / "evaluation.json").read_text())
    del values["shown_labels"], values["real"]["class_names"], values["real"]["split"]
    (out / "evaluation.json").write_text(json.dumps(values))
    write_evaluation_page(str(page), "t", str(out), {}, "sqlite:///m.db")
    assert "Classes from left to right" not in page.read_text()


def test_a_student_is_not_validated_on_changed_data(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config_file = Path(models["teacher"]) / "config.json"
    before = config_file.read_text()
    values = json.loads(before)
    config_file.write_text(json.dumps({**values, "data_sha256": "0" * 64}))
    validation._real_images.cache_clear()
    try:
        spec = distill_spec(models["store"], tmp_path / "student", validation_updates=20, held_out_rows=8, seed=1)
        config = distill(spec)
    finally:
        config_file.write_text(before)
        validation._real_images.cache_clear()
    assert config is not None
    assert "no energy distance" in capsys.readouterr().out
    assert metrics_of("distill", config.fingerprint, ENERGY_DISTANCE) == []
