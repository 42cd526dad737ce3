"""Teach, distill, sweep, evaluate and sample: what they write, that they are idempotent, what they refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from kac.checkpoint import load_config, load_model
from kac.errors import DistillKacError
from kac.networks import NetworkConfig
from pipeline import store, tracking
from pipeline.config import DistillSpec, EvaluateSpec, OptimizerConfig, SampleSpec, SweepSpec, TeachSpec
from pipeline.distill import distill
from pipeline.evaluate import evaluate
from pipeline.report import write_report
from pipeline.sample import sample
from pipeline.sweep import plan_trials, sweep
from pipeline.teach import teach
from tests.pipeline.stores import make_store, make_teacher

FEW = OptimizerConfig(updates=60, batch_size=64, learning_rate=3e-3, warmup_updates=5, ema_decay=0.9)
SMALL = NetworkConfig(width=16, depth=1)


def teach_spec(out: Path, **options: Any) -> TeachSpec:
    return TeachSpec(**{"data": "moons", "network": SMALL, "optimizer": FEW, "workers": 0, **options}, out=str(out))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, teacher: str) -> str:
    path = str(tmp_path_factory.mktemp("stores") / "store")
    make_store(path, teacher, trajectories=400, shard_size=128, guidance=(0.0, 1.0))
    return path


def distill_spec(source: str, out: Path, **options: Any) -> DistillSpec:
    return DistillSpec(**{"optimizer": FEW, "workers": 0, "steps": 2, **options}, store=source, out=str(out))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, source: str) -> str:
    out = tmp_path_factory.mktemp("students") / "two"
    distill(distill_spec(source, out))
    return str(out)


def weights(path: str | Path) -> bytes:
    return (Path(path) / "model.safetensors").read_bytes()


def test_a_teacher_is_a_function_of_its_spec(tmp_path: Path):
    for name, options in {"a": {}, "b": {}, "other": {"seed": 1}}.items():
        teach(teach_spec(tmp_path / name, **options))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "other")
    config = load_config(str(tmp_path / "a"))
    assert (config.kind, config.data, config.sample_shape, config.num_classes) == ("teacher", "moons", (2,), 2)
    assert not (tmp_path / "a" / "training").exists()


def test_teaching_lowers_the_loss(tmp_path: Path):
    longer = FEW.model_copy(update={"updates": 300})
    teach(teach_spec(tmp_path / "teacher", optimizer=longer))
    losses = [
        metric.value for metric in metrics_of("teach", load_config(str(tmp_path / "teacher")).fingerprint, "loss")
    ]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stage", ["teach", "distill"])
def test_a_complete_folder_is_left_alone_and_another_spec_refused(
    stage: str, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
):
    makers: dict[str, Callable[..., Any]] = {
        "teach": lambda **options: teach(teach_spec(tmp_path / "out", **options)),
        "distill": lambda **options: distill(distill_spec(source, tmp_path / "out", **options)),
    }
    makers[stage]()
    before = weights(tmp_path / "out")
    makers[stage]()
    assert "is complete: nothing to do" in capsys.readouterr().out
    with pytest.raises(DistillKacError, match=r"found one of another spec .*seed is 0, not 1"):
        makers[stage](seed=1)
    assert weights(tmp_path / "out") == before


def test_an_unfinished_folder_of_another_spec_is_refused(tmp_path: Path):
    diverging = OptimizerConfig(updates=60, learning_rate=1e30, warmup_updates=0, max_gradient_norm=1e30)
    with pytest.raises(DistillKacError, match="expected a finite loss"):
        teach(teach_spec(tmp_path / "out", optimizer=diverging))
    with pytest.raises(DistillKacError, match=r"optimizer.learning-rate is 1e"):
        teach(teach_spec(tmp_path / "out"))


def test_a_student_lands_nearer_than_its_teachers_own_euler_steps(source: str, teacher: str, tmp_path: Path):
    longer = FEW.model_copy(update={"updates": 600})
    distill(distill_spec(source, tmp_path / "student", steps=1, optimizer=longer))
    batch = next(store.open(source).batches(400, 0.0, [0, 4]))
    errors = {}
    for name, path in (("teacher", teacher), ("student", str(tmp_path / "student"))):
        network = load_model(path).network
        with torch.inference_mode():
            x = batch.knots[:, 0] - network(batch.knots[:, 0], torch.ones(400), batch.label)
        errors[name] = float((x - batch.knots[:, 1]).square().mean())
    assert errors["student"] < 0.5 * errors["teacher"]


def test_a_student_names_its_store_and_teacher(student: str, source: str, teacher: str):
    config, manifest = load_config(student), store.read_manifest(source)
    assert manifest is not None
    assert (config.kind, config.steps, config.guidance) == ("student", 2, 0.0)
    assert config.store_fingerprint == manifest.fingerprint
    assert config.teacher_sha256 == load_config(teacher).weights_sha256


def test_students_can_start_from_the_previous_one(student: str, source: str, tmp_path: Path):
    none = FEW.model_copy(update={"updates": 1, "learning_rate": 1e-12, "warmup_updates": 0})
    distill(distill_spec(source, tmp_path / "one", steps=1, init=student, optimizer=none))
    config = load_config(str(tmp_path / "one"))
    assert (config.steps, config.teacher_sha256) == (1, load_config(student).teacher_sha256)
    for name, value in load_model(str(tmp_path / "one")).network.state_dict().items():
        torch.testing.assert_close(value, load_model(student).network.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, r"--steps: expected a divisor of the store's 4 knots \[1, 2, 4\], found 3"),
        ({"guidance": 2.0}, r"--guidance: expected one of the store's scales \[0.0, 1.0\], found 2.0"),
        ({"guidance": 1.0, "init": "STUDENT"}, "expected a student of guidance 1.0, found one of 0.0"),
        ({"init": "OTHER"}, "expected the store's teacher"),
        ({"teacher": "OTHER"}, "expected the store's teacher"),
        ({"init": "no/such/model"}, "expected a model folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, source: str, student: str, tmp_path: Path
):
    folders = {"STUDENT": student, "OTHER": make_teacher(tmp_path / "other", seed=9)}
    options = {name: folders.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(DistillKacError, match=message):
        distill(distill_spec(source, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_an_unfinished_store_is_refused(source: str, tmp_path: Path):
    import shutil

    shutil.copytree(source, tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    with pytest.raises(DistillKacError, match="expected a finished store, found 8 shards and no manifest"):
        distill(distill_spec(str(tmp_path / "store"), tmp_path / "out"))


def test_a_grown_store_makes_another_student(teacher: str, tmp_path: Path):
    path = str(tmp_path / "store")
    make_store(path, teacher)
    distill(distill_spec(path, tmp_path / "out"))
    make_store(path, teacher, trajectories=200)
    with pytest.raises(DistillKacError, match="sample-ids"):
        distill(distill_spec(path, tmp_path / "out"))


def test_forward_stores_distill_too(teacher: str, tmp_path: Path):
    path = str(tmp_path / "store")
    make_store(path, teacher, source="forward", trajectories=200)
    distill(distill_spec(path, tmp_path / "out", steps=4))
    assert load_config(str(tmp_path / "out")).steps == 4
    with pytest.raises(DistillKacError, match="--steps: expected 4"):
        distill(distill_spec(path, tmp_path / "two", steps=2))


def test_workers_that_hold_every_cpu_stream_a_store(teacher: str, tmp_path: Path, ray_cluster: None):
    """The tasks that read for them must not wait for a CPU."""
    make_store(tmp_path / "store", teacher, trajectories=128, shard_size=32)
    distill(distill_spec(str(tmp_path / "store"), tmp_path / "out", workers=2, memory_gib=1e-9))
    assert load_config(str(tmp_path / "out")).steps == 2


def test_the_grid_has_a_folder_a_point(source: str, tmp_path: Path):
    spec = SweepSpec(
        store=source, out=str(tmp_path), steps=(1, 2), guidance=(0.0, 1.0), grid=("optimizer.updates=5,6",)
    )
    trials = plan_trials(spec)
    assert len(trials) == len({trial.name for trial in trials}) == 8
    assert {(t.spec.steps, t.spec.guidance, t.spec.optimizer.updates) for t in trials} == {
        (m, w, n) for m in (1, 2) for w in (0.0, 1.0) for n in (5, 6)
    }
    for axis in ("colour=1", "optimizer.updates", "store=a,b", "optimizer.speed=1", "optimizer.updates=x"):
        with pytest.raises(DistillKacError):
            plan_trials(spec.model_copy(update={"grid": (axis,)}))


def test_a_sweep_trains_what_is_missing_under_one_parent_run(source: str, tmp_path: Path, ray_cluster: None):
    spec = SweepSpec(store=source, out=str(tmp_path / "sweep"), steps=(1, 2), optimizer=FEW)
    alone = distill(distill_spec(source, tmp_path / "alone", steps=2))
    distill(distill_spec(source, tmp_path / "sweep" / "steps-1-guidance-0.0", steps=1))
    untouched = weights(tmp_path / "sweep" / "steps-1-guidance-0.0")
    sweep(spec)
    assert weights(tmp_path / "sweep" / "steps-1-guidance-0.0") == untouched
    swept = load_config(str(tmp_path / "sweep" / "steps-2-guidance-0.0"))
    assert swept.fingerprint == alone.fingerprint
    expected = load_model(str(tmp_path / "alone")).network.state_dict()
    for name, value in load_model(str(tmp_path / "sweep" / "steps-2-guidance-0.0")).network.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    parents = {
        run.data.tags.get("mlflow.parentRunId")
        for run in runs_of("distill")
        if run.data.tags[tracking.FINGERPRINT_TAG] == swept.fingerprint
    }
    assert parents & {run.info.run_id for run in runs_of("sweep")}
    with pytest.raises(DistillKacError, match="--steps"):
        sweep(spec.model_copy(update={"steps": (1, 3)}))


def runs_of(stage: str) -> list[Any]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.`{tracking.STAGE_TAG}` = '{stage}'", max_results=1000)
    return list(found)


def metrics_of(stage: str, fingerprint: str, name: str) -> list[Any]:
    run = next(run for run in runs_of(stage) if run.data.tags[tracking.FINGERPRINT_TAG] == fingerprint)
    return list(MlflowClient().get_metric_history(run.info.run_id, name))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory, teacher: str, student: str) -> Path:
    out = tmp_path_factory.mktemp("evaluations") / "evaluation"
    evaluate(EvaluateSpec(teacher=teacher, students=(student,), out=str(out), samples=300, solver_steps=8))
    return out


def test_an_evaluation_scores_teacher_and_students(evaluation: Path, teacher: str, student: str):
    scores = json.loads((evaluation / "evaluation.json").read_text())["scores"]
    assert [(s["kind"], s["steps"], s["nfe"]) for s in scores] == [("teacher", 8, 8), ("student", 2, 2)]
    by_hand = {}
    for kind, steps, method in (("teacher", 8, "ab2"), ("student", 2, "euler")):
        by_hand[kind] = _frechet_by_hand(teacher if kind == "teacher" else student, steps, method)
    for score in scores:
        assert score["frechet_distance"] == pytest.approx(by_hand[score["kind"]], rel=1e-3)
    assert scores[1]["frechet_ratio"] == pytest.approx(by_hand["student"] / by_hand["teacher"], rel=1e-3)
    assert 0 <= scores[1]["label_agreement"] <= 1
    for picture in ("samples.png", "frechet_by_nfe.png"):
        assert (evaluation / picture).read_bytes().startswith(b"\x89PNG")


def _frechet_by_hand(path: str, steps: int, method: str) -> float:
    import scipy.linalg

    from kac import identity
    from kac.data import load_dataset
    from kac.guidance import guide
    from kac.solvers import solve, uniform_times

    model, data = load_model(path), load_dataset("moons")
    noise = identity.noise(model.config.path.build(), 1_000_003, range(300), (2,))
    label = identity.labels(1_000_003, range(300), data.class_frequencies)
    with torch.inference_mode():
        made = solve(guide(model.network, 0.0).given(label), noise, uniform_times(steps), method).x.double().numpy()
    real = data.images.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(made.T)).real
    gap = real.mean(0) - made.mean(0)
    return float(gap @ gap + np.trace(np.cov(real.T) + np.cov(made.T) - 2 * root))


def test_the_chain_is_walked_by_fingerprints(evaluation: Path, student: str, source: str, teacher: str):
    config, manifest = load_config(student), store.read_manifest(source)
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


def test_a_failed_stage_ends_its_run_as_failed(tmp_path: Path):
    diverging = OptimizerConfig(updates=60, learning_rate=1e30, warmup_updates=0, max_gradient_norm=1e30)
    with pytest.raises(DistillKacError):
        teach(teach_spec(tmp_path / "out", optimizer=diverging, seed=99))
    run = next(run for run in runs_of("teach") if run.data.params["seed"] == "99")
    assert run.info.status == "FAILED"


def test_metrics_have_one_list_of_names():
    with pytest.raises(KeyError, match="speed"):
        tracking.TrackedRun("sqlite://", "none").metrics({"speed": 1.0})


def test_an_evaluation_refuses_a_student_of_another_teacher(student: str, tmp_path: Path):
    other = make_teacher(tmp_path / "other", seed=5)
    with pytest.raises(DistillKacError, match="expected a student of the teacher"):
        evaluate(EvaluateSpec(teacher=other, students=(student,), out=str(tmp_path / "out")))
    with pytest.raises(DistillKacError, match=r"found no config.json there"):
        evaluate(EvaluateSpec(teacher=other, students=(str(tmp_path / "none"),), out=str(tmp_path / "out")))


def test_the_report_is_one_file_with_everything_in_it(evaluation: Path, student: str, tmp_path: Path):
    page = tmp_path / "report.html"
    sections = {"distill": str(Path(student) / "spec.json")}
    write_report(str(page), "a <test>", str(evaluation), sections, "sqlite:////somewhere/mlflow.db")
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2
    assert 'src="http' not in text and "href=" not in text
    for part in (
        "a &lt;test&gt;",
        "mlflow ui --backend-store-uri sqlite:////somewhere/mlflow.db",
        "learning_rate",
        "two",
    ):
        assert part in text


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_samples_are_the_models_images_of_the_labels_asked_for(kind: str, teacher: str, student: str, tmp_path: Path):
    model, out = {"teacher": teacher, "student": student}[kind], tmp_path / "samples.npz"
    sample(SampleSpec(model=model, out=str(out), count=5, labels=(1, 0)))
    with np.load(out) as made:
        assert made["labels"].tolist() == [1, 0, 1, 0, 1]
        assert made["images"].shape == (5, 2)
        assert made["images"].dtype == np.float32
        assert np.abs(made["images"]).max() <= 1
        first = made["images"][:2]
    sample(SampleSpec(model=model, out=str(tmp_path / "more.npz"), count=700, labels=(1, 0)))
    with np.load(tmp_path / "more.npz") as made:
        np.testing.assert_allclose(made["images"][:2], first, atol=1e-5)
    sample(SampleSpec(model=model, out=str(tmp_path / "sheet.png"), count=3))
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": (2,)}, "--labels: expected classes 0 .. 1"),
        ({"steps": 3}, "--steps: expected 2"),
        ({"guidance": 1.0}, "--guidance: expected 0"),
    ],
)
def test_samples_that_a_student_cannot_make_are_refused(
    options: dict[str, Any], message: str, student: str, tmp_path: Path
):
    with pytest.raises(DistillKacError, match=message):
        sample(SampleSpec(model=student, out=str(tmp_path / "x.npz"), **options))
