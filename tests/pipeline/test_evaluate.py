"""Evaluate: scores against figures by hand, the chain of fingerprints, and one table of metrics behind everything."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from mlflow import MlflowClient

from kac import noise as noises
from kac.checkpoint import load_config, load_model
from kac.data import DataConfig, all_rows, open_dataset
from kac.errors import DistillKacError
from kac.guidance import guide
from kac.metrics import QUALITY, QualityMetric
from kac.solvers import knot_times, solve
from pipeline import store, tracking
from pipeline.config import EvaluateSpec
from pipeline.evaluate import TABLE_HEAD, evaluate, read_scores, table
from pipeline.report import write_report
from tests.pipeline.stages import runs_of
from tests.pipeline.stores import make_teacher


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory, teacher: str, student: str) -> Path:
    out = tmp_path_factory.mktemp("evaluations") / "evaluation"
    evaluate(EvaluateSpec(teacher=teacher, students=(student,), out=str(out), samples=300, solver_steps=8))
    return out


def test_an_evaluation_scores_teacher_and_students(evaluation: Path, teacher: str, student: str):
    scores = json.loads((evaluation / "evaluation.json").read_text())["scores"]
    assert [(s["kind"], s["steps"], s["metrics"]["nfe"]) for s in scores] == [("teacher", 8, 8), ("student", 2, 2)]
    by_hand = {}
    for kind, steps, method in (("teacher", 8, "ab2"), ("student", 2, "euler")):
        by_hand[kind] = _frechet_by_hand(teacher if kind == "teacher" else student, steps, method)
    for score in scores:
        assert score["metrics"]["frechet_distance"] == pytest.approx(by_hand[score["kind"]], rel=1e-3)
    assert scores[1]["metrics"]["frechet_ratio"] == pytest.approx(by_hand["student"] / by_hand["teacher"], rel=1e-3)
    assert set(scores[0]["metrics"]) == set(QUALITY) - {"frechet_ratio", "endpoint_error"}
    assert set(scores[1]["metrics"]) == set(QUALITY)
    for picture in ("samples.png", "quality_by_nfe.png"):
        assert (evaluation / picture).read_bytes().startswith(b"\x89PNG")


def _frechet_by_hand(path: str, steps: int, method: str) -> float:
    model, data = load_model(path), open_dataset(DataConfig(kind="moons"))
    noise = noises.noise(model.config.path.build(), 1_000_003, range(300), (2,))
    label = noises.labels(1_000_003, range(300), data.description.class_frequencies)
    with torch.inference_mode():
        made = solve(guide(model.network, 0.0, label), noise, knot_times(steps), method).x.double().numpy()
    real = all_rows(data.train).images.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(made.T)).real
    gap = real.mean(0) - made.mean(0)
    return float(gap @ gap + np.trace(np.cov(real.T) + np.cov(made.T) - 2 * root))


def test_the_chain_is_walked_by_fingerprints(evaluation: Path, student: str, small_store: str, teacher: str):
    config, manifest = load_config(student), store.read_manifest(small_store)
    assert manifest is not None
    run = next(run for run in runs_of("evaluate") if config.fingerprint in run.data.tags.values())
    made = next(run for run in runs_of("distill") if run.data.tags[tracking.FINGERPRINT_TAG] == config.fingerprint)
    assert made.data.tags[f"{tracking.INPUT_TAG}rollout"] == manifest.fingerprint
    assert made.data.tags[f"{tracking.INPUT_TAG}teacher"] == load_config(teacher).weights_sha256
    children = [r for r in runs_of("evaluate-model") if r.data.tags["mlflow.parentRunId"] == run.info.run_id]
    assert {child.data.metrics["nfe"] for child in children} == {8.0, 2.0}
    for child in children:
        assert set(child.data.metrics) <= set(tracking.METRICS)
        assert [file.path for file in MlflowClient().list_artifacts(child.info.run_id)] == ["samples.png"]
    assert run.info.status == "FINISHED"


def test_an_evaluation_refuses_a_student_of_another_teacher(student: str, tmp_path: Path):
    other = make_teacher(tmp_path / "other", seed=5)
    with pytest.raises(DistillKacError, match="expected a student of the teacher"):
        evaluate(EvaluateSpec(teacher=other, students=(student,), out=str(tmp_path / "out")))
    with pytest.raises(DistillKacError, match=r"found no config.json there"):
        evaluate(EvaluateSpec(teacher=other, students=(str(tmp_path / "none"),), out=str(tmp_path / "out")))


def test_a_complete_evaluation_is_read_not_made_again(
    evaluation: Path, teacher: str, student: str, capsys: pytest.CaptureFixture[str]
):
    spec = EvaluateSpec(teacher=teacher, students=(student,), out=str(evaluation), samples=300, solver_steps=8)
    assert evaluate(spec) == read_scores(str(evaluation))
    assert "is complete: nothing to do" in capsys.readouterr().out


def test_a_new_metric_is_one_line_for_table_log_and_report(
    teacher: str, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    brightness = QualityMetric(
        "brightness", "mean of all values", "bright", "+.5f", "", True, compute=lambda made: float(made.images.mean())
    )
    monkeypatch.setitem(QUALITY, "brightness", brightness)
    monkeypatch.setattr("pipeline.evaluate.COLUMNS", [*QUALITY.values()])
    monkeypatch.setattr("pipeline.evaluate.TABLE_HEAD", [*TABLE_HEAD, "bright"])
    monkeypatch.setattr("pipeline.report.COLUMNS", [*QUALITY.values()])
    monkeypatch.setitem(tracking.METRICS, "brightness", brightness)
    spec = EvaluateSpec(teacher=teacher, out=str(tmp_path), samples=50, solver_steps=8)
    (score,) = evaluate(spec)
    assert f"{score.metrics['brightness']:+.5f}" in table([score]).splitlines()[-1]
    logged = [run.data.metrics["brightness"] for run in runs_of("evaluate-model") if "brightness" in run.data.metrics]
    assert logged == [score.metrics["brightness"]]
    write_report(str(tmp_path / "page.html"), "t", str(tmp_path), {}, "sqlite:///mlflow.db")
    assert "bright: mean of all values." in (tmp_path / "page.html").read_text()
