"""The stages as Python functions, which run in this process, without Ray or MLflow unless requested."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pipeline
from kac import load_model
from kac.util.errors import ArgumentError
from pipeline.cluster import connection
from pipeline.config import DistillSpec, TeachSpec

NOTEBOOK = """
import sys
from pipeline import distill, evaluate, rollout, teach

few = {"updates": 20, "batch_size": 32, "warmup_updates": 2}
small = {"kind": "mlp", "width": 16, "depth": 1}
teacher = teach(data="moons", out="teacher", network=small, optimizer=few, tracking=False)
store = rollout(teacher=teacher.path, store="store", trajectories=64, shard_size=32, knots=4, solver_steps=8,
                tracking=False)
student = distill(store=store.path, out="student", steps=2, optimizer=few, tracking=False)
result = evaluate(teacher=teacher.path, students=[student.path], out="evaluation", samples=60, features=["pixels"],
                  solver_steps=8, tracking=False)
images = student.load().sample(10, labels=[0, 1], seed=3)
assert images.images.shape == (10, 2) and images.label.tolist() == [0, 1] * 5
assert store.manifest.guidance == store.open().guidance == (0.0,)
assert set(teacher.metrics) >= {"loss"} and set(student.metrics) >= {"loss"}
assert "frechet_distance_pixels" in result.metrics["student"], result.metrics
again = distill(store=store.path, out="student", steps=2, optimizer=few, tracking=False)
assert again.config == student.config and again.metrics == {}
assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
"""


def test_a_notebook_runs_without_ray_output_or_a_database(tmp_path: Path, project_root: Path):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home"), "PYTHONPATH": str(project_root)}
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation", "home", "store", "student", "teacher"]
    assert not list(tmp_path.rglob("run.json"))


def test_a_model_samples_the_images_of_the_job(student: str, teacher: str, tmp_path: Path):
    from pipeline.config import SampleSpec
    from pipeline.sample import sample

    for folder, steps, guidance in ((student, None, None), (teacher, 7, 1.5)):
        out = str(tmp_path / "samples.npz")
        spec = SampleSpec(model=folder, out=out, count=20, seed=5, labels=("1", "0"), steps=steps, guidance=guidance)
        sample(spec)
        samples = load_model(folder).sample(20, seed=5, labels=[1, 0], steps=steps, guidance=guidance)
        with np.load(out) as written:
            assert np.array_equal(written["images"], samples.images.numpy())
            assert np.array_equal(written["labels"], samples.label.numpy())


def test_an_argument_that_a_model_does_not_support_is_an_error(student: str):
    for options in ({"steps": 7}, {"labels": [9]}, {"guidance": 3.0}):
        with pytest.raises(ArgumentError) as refused:
            load_model(student).sample(4, **options)
        assert refused.value.name == next(iter(options))


def test_a_spec_and_its_fields_are_the_same(
    small_store: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connection, "connect", lambda: pytest.fail("a stage starts Ray"))
    spec = DistillSpec(store=small_store, out=str(tmp_path / "a"), optimizer={"updates": 3})
    by_spec = pipeline.distill(spec, tracking=False)
    by_fields = pipeline.distill(store=small_store, out=tmp_path / "b", optimizer={"updates": 3}, tracking=False)
    assert by_spec.config.weights_sha256 == by_fields.config.weights_sha256
    students = [Path(by_spec.path), Path(by_fields.path)]
    scored = pipeline.evaluate(students=students, teacher=teacher, out=tmp_path / "e", samples=20, tracking=False)
    assert [score.folder for score in scored.scores[-2:]] == [by_spec.path, by_fields.path]
    with pytest.raises(TypeError, match="not both"):
        pipeline.distill(spec, steps=2)
    with pytest.raises(ArgumentError) as refused:
        pipeline.distill(store=small_store, out=str(tmp_path / "c"), stepz=2)
    assert refused.value.name == "stepz"
    with pytest.raises(ArgumentError) as refused:
        pipeline.teach(TeachSpec(out=str(tmp_path / "d"), dry_run=True, workers=0))
    assert refused.value.name == "dry_run"


def test_a_sweep_of_teachers_returns_the_best_teacher(tmp_path: Path, ray_cluster: None):
    result = pipeline.sweep(
        stage="teach",
        data="moons",
        out=tmp_path / "sweep",
        grid={"path.a": (9, 25)},
        optimizer={"updates": 3},
        samples=100,
        features=("pixels",),
        tracking=False,
    )
    assert [trial.values for trial in result.trials] == [{"path.a": 9}, {"path.a": 25}]
    assert result.best in {trial.out for trial in result.trials}
    with pytest.raises(ArgumentError) as refused:
        pipeline.sweep(stage="paint", out="o")
    assert refused.value.name == "stage"


@pytest.mark.parametrize("stage", ["teach", "rollout", "distill", "sweep", "evaluate"])
def test_stages_are_functions_with_documentation(stage: str):
    function = getattr(pipeline, stage)
    assert inspect.isfunction(function)
    assert f"fields of ``{stage.capitalize()}Spec``" in inspect.getdoc(function)


def test_a_sweep_returns_its_trials_and_the_best_student(small_store: str, tmp_path: Path, ray_cluster: None):
    result = pipeline.sweep(
        store=small_store,
        out=str(tmp_path / "sweep"),
        steps=(1, 2),
        optimizer={"updates": 3},
        samples=100,
        features=("pixels",),
        tracking=False,
    )
    assert [trial.status for trial in result.trials] == ["finished", "finished"]
    assert result.best in {trial.out for trial in result.trials}
    assert not list((tmp_path / "sweep").rglob("run.json"))
