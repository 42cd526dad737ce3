"""Every stage respects the teacher's conditioning: an unconditional teacher gets the null label and no guidance.

The teacher in these tests returns NaN for every class, so a stage that uses a class gets no finite numbers.
"""

import json
import math
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.exceptions import MlflowException

from kac.model import load_config, load_model
from kac.networks import OutsideConfig
from kac.path import PathConfig
from kac.precision import Precision
from kac.sampling import teacher_sampling
from kac.util.errors import ArgumentError, CheckpointError, DistillKacError
from pipeline import store
from pipeline.config import CLAIMS, EvaluateSpec, SampleSpec, StudySpec, SweepSpec
from pipeline.distill import distill
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.evaluate.samples import ModelSamples
from pipeline.rollout import rollout
from pipeline.sample import sample
from pipeline.study import study
from pipeline.sweep import sweep
from pipeline.teach import teach
from pipeline.tracking import run_of_output
from pipeline.tracking.logged_models import model_of_run
from tests.pipeline.stages import distill_spec, metrics_of, teach_spec
from tests.pipeline.stores import make_spec, make_store, make_teacher

NULL = 2
"""The null label of the moons."""

FLOW_MAP: dict[str, Any] = {"kind": "flow-map", "grids": (1, 2, 4)}


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory, tracking_database: str) -> str:
    return make_teacher(tmp_path_factory.mktemp("models") / "teacher", conditioning="none")


@pytest.fixture(scope="module")
def its_store(unconditional: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("stores") / "store")
    make_store(path, unconditional, trajectories=200, shard_size=128)
    return path


@pytest.fixture(scope="module")
def its_student(its_store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("students") / "student"
    distill(distill_spec(its_store, out))
    return str(out)


# The conditioning of a teacher


@pytest.mark.parametrize(
    ("options", "learned"),
    [
        ({"label_dropout": 1.0}, "none"),
        ({"label_dropout": 0.5}, "classes_and_null"),
        ({"label_dropout": 0.0}, "classes"),
        ({"network": OutsideConfig(module="tests.kac.outside_modules:Blind", labels="none")}, "none"),
        (
            {
                "network": OutsideConfig(
                    module="tests.kac.outside_modules:Field", labels="without_null", arguments={"classes": 2}
                ),
                "label_dropout": 0.0,
            },
            "classes",
        ),
    ],
    ids=str,
)
def test_teach_records_the_conditioning(options: dict[str, Any], learned: str, tmp_path: Path):
    made = teach(teach_spec(tmp_path / "teacher", sample_updates=30, validation_updates=30, **options))
    assert made is not None
    assert made.conditioning == learned
    assert load_config(str(tmp_path / "teacher")).conditioning == learned
    distances = metrics_of("teach", made.fingerprint, "validation/energy_distance")
    assert all(math.isfinite(point.value) for point in distances)
    assert len(distances) == 2


def test_an_old_folder_without_conditioning_is_read_as_conditional(teacher: str, tmp_path: Path):
    values = json.loads(Path(teacher, "config.json").read_text())
    del values["conditioning"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(str(tmp_path)) == load_config(teacher)
    assert load_config(str(tmp_path)).conditioning == "classes_and_null"


# Every stage


@pytest.mark.parametrize("source", ["trajectory", "forward"])
def test_a_rollout_uses_and_stores_the_null_label(source: str, unconditional: str, tmp_path: Path):
    manifest = rollout(make_spec(tmp_path / "store", unconditional, source=source))
    assert manifest.identity.labels == "null"
    table = pq.read_table(tmp_path / "store" / "data" / "guidance=0.0")
    assert set(table["label"].to_pylist()) == {NULL}
    images = table[manifest.identity.knot_columns[-1]].combine_chunks()
    assert np.isfinite(images.to_numpy_ndarray()).all()


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2},
        {"objective": FLOW_MAP, "steps": 4},
        {"objective": FLOW_MAP, "steps": 4, "guidance": "all"},
        {"objective": FLOW_MAP, "steps": 4, "refine": {"kind": "data", "spaces": ("pixels", "classifier", "random")}},
        {"steps": 2, "refine": "data"},
    ],
    ids=["endpoint", "any step", "all scales", "any step refined", "refined"],
)
def test_students_are_unconditional_too(options: dict[str, Any], its_store: str, tmp_path: Path):
    spec = distill_spec(
        its_store, tmp_path / "student", held_out_rows=40, validation_updates=30, sample_updates=30, **options
    )
    config = distill(spec)
    assert config is not None
    assert config.conditioning == "none"
    for name in ("loss", "validation/energy_distance", "validation/endpoint_error"):
        logged = metrics_of("distill", config.fingerprint, name)
        assert logged
        assert all(math.isfinite(point.value) for point in logged)
    again = distill(spec.model_copy(update={"out": str(tmp_path / "again"), "init": str(tmp_path / "student")}))
    assert again is not None
    assert again.conditioning == "none"


def test_refinement_compares_without_classes(its_store: str, its_student: str, tmp_path: Path):
    """The class weight has no effect."""
    weights = []
    for weight in (0.5, 50.0):
        out = tmp_path / f"weight-{weight}"
        refine = {"kind": "data", "class_weight": weight}
        distill(distill_spec(its_store, out, init=its_student, refine=refine, validation_updates=0))
        weights.append(load_model(str(out)).network.enter.weight)
    assert torch.equal(*weights)


def test_samples_have_the_null_label(unconditional: str, its_student: str, tmp_path: Path):
    for model in (unconditional, its_student):
        sample(SampleSpec(model=model, out=str(tmp_path / "made.npz"), count=5))
        with np.load(tmp_path / "made.npz") as made:
            assert np.isfinite(made["images"]).all()
            assert made["labels"].tolist() == [NULL] * 5
        with pytest.raises(ArgumentError, match=r"^`labels`.*unconditional"):
            sample(SampleSpec(model=model, out=str(tmp_path / "made.npz"), labels=(0, 1)))
        with pytest.raises(ArgumentError, match=r"^`guidance`"):
            sample(SampleSpec(model=model, out=str(tmp_path / "made.npz"), guidance=1.0))


def test_an_evaluation_reports_no_label_agreement(unconditional: str, its_student: str, tmp_path: Path):
    spec = EvaluateSpec(
        teacher=unconditional, students=(its_student,), out=str(tmp_path / "out"), samples=100, solver_steps=8, actors=0
    )
    real, teacher, student = evaluate(spec)
    assert "label_agreement" in real.metrics
    for score in (teacher, student):
        assert "label_agreement" not in score.metrics
        assert math.isfinite(score.metrics["frechet_distance_classifier"])
    with pytest.raises(ArgumentError, match=r"^`guidance`.*unconditional"):
        evaluate(spec.model_copy(update={"guidance": (1.0,), "out": str(tmp_path / "guided")}))
    assert not (tmp_path / "guided").exists()


def test_only_samples_of_the_null_label_have_a_different_cache_key(teacher: str):
    config, sampling = load_config(teacher), teacher_sampling(load_config(teacher))
    names = {
        conditioning: ModelSamples(
            teacher, config.model_copy(update={"conditioning": conditioning}), sampling, Precision(), 0, 10, 10
        ).fingerprint
        for conditioning in ("classes_and_null", "classes", "none")
    }
    assert names["classes_and_null"] == names["classes"] != names["none"]


def test_a_study_leaves_out_guidance_and_tests_the_other_claims(
    unconditional: str, its_store: str, its_student: str, tmp_path: Path
):
    lines = study(
        StudySpec(teacher=unconditional, store=its_store, students=(its_student,), out=str(tmp_path), samples=60)
    )
    left_out = {claim: line for claim, line in lines.items() if line.startswith("left out")}
    assert left_out.keys() == {"guidance", "paths"}  # it has no rivals
    assert "unconditional" in left_out["guidance"]
    assert lines.keys() == set(CLAIMS)


def test_a_study_refuses_a_conditional_rival(unconditional: str, tmp_path: Path):
    rival = make_teacher(tmp_path / "rival", path_config=PathConfig(kind="gaussian"))
    with pytest.raises(DistillKacError, match=r"`rivals` .*conditional is True"):
        study(StudySpec(teacher=unconditional, rivals=(rival,), out=str(tmp_path / "study"), samples=60))


def test_the_logged_model_takes_no_class(its_student: str):
    run = run_of_output(its_student)
    assert run is not None
    logged = model_of_run(run)
    assert logged is not None
    model = mlflow.pyfunc.load_model(logged.model_uri)
    assert model.input_example["label"].tolist() == [-1]
    images = model.predict({"label": np.array([-1, -1])})
    assert images.shape == (2, 2)
    assert np.isfinite(images).all()
    with pytest.raises(MlflowException, match=r"label.*unconditional.*-1"):
        model.predict({"label": np.array([-1, 1])})


# Guidance


@pytest.mark.parametrize("conditioning", ["none", "classes"])
def test_a_rollout_refuses_guidance(conditioning: Any, tmp_path: Path):
    teacher = make_teacher(tmp_path / "teacher", conditioning=conditioning)
    with pytest.raises(ArgumentError, match=r"^`guidance`"):
        rollout(make_spec(tmp_path / "store", teacher, guidance=(0.0, 2.0)))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("rolls_out", [False, True])
def test_a_sweep_refuses_guidance_before_it_starts(rolls_out: bool, its_store: str, tmp_path: Path):
    spec = SweepSpec(store=its_store, out=str(tmp_path / "sweep"), guidance=(0.0, 2.0), steps=(2,), rollout=rolls_out)
    with pytest.raises(ArgumentError, match=r"^`guidance`.*unconditional"):
        sweep(spec)
    assert not (tmp_path / "sweep").exists()


def test_a_guided_student_is_refused(its_store: str, tmp_path: Path):
    with pytest.raises(DistillKacError, match=r"^`guidance`.*unconditional"):
        distill(distill_spec(its_store, tmp_path / "out", guidance=2.0))


# The teacher, the store and the initial weights must have the same conditioning


def test_initial_weights_with_different_conditioning_are_refused(
    unconditional: str, its_store: str, its_student: str, tmp_path: Path
):
    """The same weights can be recorded as conditional in an old folder and as unconditional in a new folder."""
    before = tmp_path / "before"
    before.mkdir()
    for name in ("config.json", "model.safetensors"):
        (before / name).write_bytes(Path(unconditional, name).read_bytes())
    values = json.loads((before / "config.json").read_text())
    del values["conditioning"]
    (before / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"before: .* with class labels"):
        distill(distill_spec(its_store, tmp_path / "out", teacher=str(before)))

    student = json.loads(Path(its_student, "config.json").read_text())
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_bytes(Path(its_student, "model.safetensors").read_bytes())
    (tmp_path / "student" / "config.json").write_text(json.dumps({**student, "conditioning": "classes"}))
    with pytest.raises(CheckpointError, match=r"student: .* with class labels"):
        distill(distill_spec(its_store, tmp_path / "out", init=str(tmp_path / "student")))


def test_a_store_with_classes_does_not_fit_an_unconditional_teacher(unconditional: str, its_store: str, tmp_path: Path):
    conditional = make_teacher(tmp_path / "teacher")
    path = tmp_path / "store"
    made = make_store(path, conditional)
    values = json.loads(Path(conditional, "config.json").read_text())
    Path(conditional, "config.json").write_text(json.dumps({**values, "conditioning": "none"}))
    with pytest.raises(CheckpointError, match=r"teacher: .* without class labels"):
        distill(distill_spec(str(path), tmp_path / "out"))
    with pytest.raises(store.StoreError, match=r"labels.*classes"):
        rollout(make_spec(path, conditional, trajectories=200))
    assert made.identity.labels == "classes"
