"""One run per model: what an evaluation adds to the runs of its models, and how it finds models by their runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from kac.model import load_config
from kac.util.errors import ArgumentError, DistillKacError
from pipeline import tracking
from pipeline.config import EvaluateSpec
from pipeline.distill import distill
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.evaluate.inputs import unique_names
from pipeline.evaluate.results import read_shown
from pipeline.evaluate.scores import read_record, table
from pipeline.teach import teach
from tests.pipeline.stages import FEW, distill_spec, run_of, runs_of, teach_spec
from tests.pipeline.stores import make_store, make_teacher


def evaluate_into(out: Path, **options: Any) -> str:
    """Evaluate 60 samples in this process, and return the fingerprint of the evaluation."""
    evaluate(EvaluateSpec(**{"samples": 60, "actors": 0, "features": ("pixels",), **options}, out=str(out)))
    return read_record(str(out)).fingerprint


def artifacts(run_id: str, below: str | None = None) -> list[str]:
    return sorted(file.path for file in MlflowClient().list_artifacts(run_id, below))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, tracking_database: str) -> dict[str, str]:
    """A teacher with a run in MLflow, and its any-step student of all guidance scales."""
    folder = tmp_path_factory.mktemp("taught")
    teach(teach_spec(folder / "teacher"))
    make_store(str(folder / "store"), str(folder / "teacher"), trajectories=400, shard_size=128, guidance=(0.0, 1.0))
    options = {"kind": "flow-map", "grids": (1, 2, 4)}
    distill(distill_spec(str(folder / "store"), folder / "every", objective=options, guidance="all"))
    return {name: str(folder / name) for name in ("teacher", "store", "every")}


def test_scores_are_in_the_run_that_produced_the_model(taught: dict[str, str], tmp_path: Path):
    fingerprint = evaluate_into(tmp_path / "out", teacher=taught["teacher"], students=(taught["every"],), steps=(1, 2))
    record = read_record(str(tmp_path / "out"))
    student = run_of("distill", load_config(taught["every"]).fingerprint)
    by_name = {score.name: score.metrics["frechet_distance_pixels"] for score in record.scores}
    assert {n: v for n, v in student.data.metrics.items() if n.endswith("frechet_distance_pixels")} == {
        "frechet_distance_pixels": by_name["every@2 w=0"],
        "steps_1/frechet_distance_pixels": by_name["every@1 w=0"],
        "guidance_1/frechet_distance_pixels": by_name["every@2 w=1"],
        "steps_1/guidance_1/frechet_distance_pixels": by_name["every@1 w=1"],
    }
    assert "loss" in student.data.metrics, "the run also has the training curves"
    folder = f"evaluation-{fingerprint[:8]}"
    names = ["quality_by_nfe.png", "samples.png", "table.txt"]
    teacher = run_of("teach", load_config(taught["teacher"]).fingerprint)
    for run in (student, teacher):
        assert artifacts(run.info.run_id, folder) == [f"{folder}/{name}" for name in names]
        assert run.data.tags["distillkac.evaluation"] == fingerprint
        assert run.info.status == "FINISHED"
    assert teacher.data.metrics["frechet_distance_pixels"] == by_name["teacher w=0"]
    assert teacher.data.metrics["guidance_1/frechet_distance_pixels"] == by_name["teacher w=1"]


def test_the_run_of_the_evaluation_has_the_comparison(taught: dict[str, str], tmp_path: Path):
    options = {"students": (taught["every"],), "steps": (2,), "samples": 50}
    run = run_of("evaluate", evaluate_into(tmp_path / "out", teacher=taught["teacher"], **options))
    assert artifacts(run.info.run_id) == [
        "evaluation.json",
        "quality_by_nfe.png",
        "samples.png",
        "table.json",
        "table.txt",
    ]
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "table.json", "type": "table"}]
    table_json = MlflowClient().download_artifacts(run.info.run_id, "table.json", str(tmp_path))
    record = read_record(str(tmp_path / "out"))
    assert len(json.loads(Path(table_json).read_text())["data"]) == len(record.scores)
    assert (tmp_path / "out" / "table.txt").read_text() == table(record)
    children = [r for r in runs_of("evaluate-model") if r.data.tags["mlflow.parentRunId"] == run.info.run_id]
    assert [child.info.run_name for child in children] == ["real images"]
    images = read_shown(str(tmp_path / "out"))
    assert images is not None
    assert [rows.shape for rows in images] == [(12, 2)] * len(record.scores)


def test_other_steps_of_a_teacher_have_a_prefix(taught: dict[str, str], tmp_path: Path):
    evaluate_into(tmp_path / "out", teacher=taught["teacher"], solver_steps=8)
    metrics = run_of("teach", load_config(taught["teacher"]).fingerprint).data.metrics
    assert metrics["steps_8/nfe"] == 8
    assert metrics["nfe"] == 100


def test_runs_are_compared_by_their_ids(taught: dict[str, str], tmp_path: Path):
    """The evaluation finds the teacher by its weights."""
    distill(distill_spec(taught["store"], tmp_path / "two", seed=3))
    two = str(tmp_path / "two")
    ids = [run_of("distill", load_config(path).fingerprint).info.run_id for path in (taught["every"], two)]
    evaluate_into(tmp_path / "out", runs=ids, steps=(2,), guidance=(0.0,))
    scores = read_record(str(tmp_path / "out")).scores
    assert [score.name for score in scores] == ["real images", "teacher w=0", "every@2 w=0", "two"]
    assert scores[1].folder == taught["teacher"]


def test_the_store_names_a_teacher_without_a_run(small_store: str, student: str, teacher: str, tmp_path: Path):
    run = tracking.run_of_output(student)
    assert run is not None
    evaluate_into(tmp_path / "out", runs=(run.run_id,), solver_steps=8)
    assert read_record(str(tmp_path / "out")).scores[1].folder == teacher


def test_inputs_that_cannot_be_compared_are_refused_in_one_line(taught: dict[str, str], tmp_path: Path):
    for message, options in {
        "`runs` nothing .*sqlite": {"runs": ("nothing",)},
        "`runs` .*stage rollout": {"runs": (_other_run(tmp_path),)},
        "`from_sweep` .*answer.json": {"from_sweep": str(tmp_path / "sweep")},
        "`teacher`": {},
    }.items():
        with pytest.raises(ArgumentError, match=message) as caught:
            evaluate_into(tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
    teach(teach_spec(tmp_path / "second", seed=8))
    both = [
        run_of("teach", load_config(path).fingerprint).info.run_id
        for path in (taught["teacher"], str(tmp_path / "second"))
    ]
    with pytest.raises(ArgumentError, match=r"`runs` has the teacher .*second besides"):
        evaluate_into(tmp_path / "out", runs=both)
    other = make_teacher(tmp_path / "other", seed=5)
    run_id = run_of("distill", load_config(taught["every"]).fingerprint).info.run_id
    with pytest.raises(DistillKacError, match="another teacher"):
        evaluate_into(tmp_path / "out", teacher=other, runs=(run_id,))


def _other_run(out: Path) -> str:
    from pipeline.config import RolloutSpec

    spec = RolloutSpec(teacher="t", store="s")
    with tracking.start_run(spec=spec, fingerprint="f", inputs={}, output=str(out / "store")) as run:
        return run.run_id


def test_the_front_of_a_sweep_is_evaluated_again_with_intervals(taught: dict[str, str], tmp_path: Path):
    distill(distill_spec(taught["store"], tmp_path / "sweep" / "steps-2", optimizer=FEW, seed=4))
    answer = {"teacher": None, "store": taught["store"], "front": ["/gone/steps-2"]}
    (tmp_path / "sweep" / "answer.json").write_text(json.dumps(answer))
    evaluate_into(tmp_path / "out", from_sweep=str(tmp_path / "sweep"), samples=50, seeds=2, solver_steps=8)
    record = read_record(str(tmp_path / "out"))
    assert record.scores[2].name == "steps-2"
    assert record.scores[2].half_widths["frechet_distance_pixels"] > 0
    tags = run_of("distill", record.scores[2].fingerprint).data.tags
    assert "distillkac.half_width.frechet_distance_pixels" in tags
    assert tags["distillkac.evaluation.seeds"] == "1000003 1000004"


def test_students_with_equal_folder_names_get_longer_names():
    assert unique_names(["/a/x/two", "/a/y/two", "/a/four"]) == {
        "/a/x/two": "x/two",
        "/a/y/two": "y/two",
        "/a/four": "four",
    }
