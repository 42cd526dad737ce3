"""A model in the latents of an autoencoder: every stage works in latents, and every delivered image is decoded."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pandas
import pytest
import torch

from kac.data import open_autoencoder, open_dataset
from kac.losses.refinement import straight_through
from kac.model import decoder_of, image_shape, load_config, load_model
from kac.networks import MLPConfig
from kac.util.errors import ArgumentError, DistillKacError
from kac.util.images import delivered
from pipeline import store
from pipeline.config import CLAIMS, EvaluateSpec, OptimizerConfig, RolloutSpec, SampleSpec, StudySpec
from pipeline.distill import distill
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.rollout import rollout
from pipeline.sample import sample
from pipeline.study import study
from pipeline.teach import resolve_spec, teach
from pipeline.tracking import TrackedRun, run_of_output
from pipeline.tracking.logged_models import model_of_run
from pipeline.training.validation import ENERGY_DISTANCE
from tests import autoencoders
from tests.pipeline.stages import distill_spec, metrics_of, teach_spec

LONGER = OptimizerConfig(updates=400, batch_size=256, learning_rate=6e-3, warmup_updates=20, ema_decay=0.98)
STUDENT = OptimizerConfig(updates=200, batch_size=128, learning_rate=3e-3, warmup_updates=5, ema_decay=0.95)
FLOW_MAP: dict[str, Any] = {"kind": "flow-map", "grids": (1, 2, 4)}
SPACES = ("pixels", "teacher", "classifier")


class Made(NamedTuple):
    """The folders of a small run of all stages."""

    autoencoder: str
    teacher: str
    store: str
    student: str
    refined: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tracking_database: str) -> Made:
    folder = tmp_path_factory.mktemp("latents")
    made = Made(*(str(folder / name) for name in Made._fields))
    autoencoders.write_trained(folder / "autoencoder")
    network, data = MLPConfig(width=64, depth=2), {"kind": "digits", "autoencoder": made.autoencoder}
    teach(teach_spec(folder / "teacher", data=data, network=network, optimizer=LONGER))
    rollout(RolloutSpec(teacher=made.teacher, store=made.store, trajectories=512, knots=4, solver_steps=20, actors=0))
    shared = {"objective": FLOW_MAP, "optimizer": STUDENT}
    distill(distill_spec(made.store, folder / "student", held_out_rows=16, **shared))
    refine = {"kind": "data", "spaces": SPACES, "real_images": 256, "steps": (1, 2)}
    shared["optimizer"] = STUDENT.model_copy(update={"updates": 60, "ema_decay": 0.9})
    distill(distill_spec(made.store, folder / "refined", init=made.student, refine=refine, **shared))
    return made


def test_the_teacher_the_store_and_the_students_live_in_latents(made: Made):
    for path in (made.teacher, made.student, made.refined):
        config = load_config(path)
        assert config.sample_shape == (4, 4, 4)
        assert image_shape(config) == (1, 8, 8)
        assert config.data_sha256 == open_dataset(config.data).description.sha256
        assert config.autoencoder_sha256 == open_autoencoder(made.autoencoder).sha256
    assert store.open(made.store).identity.sample_shape == (4, 4, 4)


def test_validation_compares_images(made: Made):
    values = [entry.value for entry in metrics_of("teach", load_config(made.teacher).fingerprint, ENERGY_DISTANCE)]
    assert len(values) > 1
    assert values[-1] < values[0]


def test_samples_are_decoded_images(made: Made, tmp_path: Path):
    model = load_model(made.student)
    images = model.sample(8, steps=2, labels=[3], seed=1).images
    assert images.shape == (8, 1, 8, 8)
    assert torch.equal(images, delivered(images))
    sample(SampleSpec(model=made.student, count=8, steps=2, labels=("3",), seed=1, out=str(tmp_path / "i.npz")))
    with np.load(tmp_path / "i.npz") as arrays:
        assert np.array_equal(arrays["images"], images.numpy())
    sample(SampleSpec(model=made.teacher, count=4, steps=4, out=str(tmp_path / "i.png")))
    sample(SampleSpec(model=made.student, count=4, raw=True, out=str(tmp_path / "raw.npz")))
    with np.load(tmp_path / "raw.npz") as arrays:
        assert arrays["images"].shape == (4, 1, 8, 8)


def test_gradients_flow_through_the_decoder(made: Made):
    config = load_config(made.student)
    latents = open_dataset(config.data).train.rows(torch.arange(4)).images.requires_grad_()
    images = straight_through(decoder_of(config)(latents))
    images.square().sum().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().amin(0).max()) > 0


def test_the_evaluation_is_in_pixels_and_has_two_floors(made: Made, tmp_path: Path):
    spec = EvaluateSpec(
        teacher=made.teacher,
        students=(made.student, made.refined),
        steps=(1, 2),
        samples=400,
        actors=0,
        out=str(tmp_path / "evaluation"),
    )
    real, decoded, teacher, *students = evaluate(spec)
    assert real.name == "real images"
    assert decoded.name == "held-out images through the autoencoder"
    assert real.count == decoded.count == 355
    assert len(students) == 4
    name = "frechet_distance_pixels"
    assert real.metrics[name] < decoded.metrics[name] < teacher.metrics[name]
    assert decoded.metrics["label_agreement"] > 0.8
    assert "nfe" not in decoded.metrics
    with np.load(Path(spec.out) / "samples.npz") as shown:
        assert len(shown.files) == 3 + len(students)
        assert {shown[name].shape for name in shown.files} == {(12, 1, 8, 8)}
        assert 0 < np.abs(shown["0"] - shown["1"]).mean() < 0.5
    assert load_config(made.refined).refined_in == SPACES
    by_name = {score.name: score.metrics["frechet_distance_classifier"] for score in students}
    assert by_name["refined@1"] < 0.8 * by_name["student@1"]  # refinement reaches the images through the decoder
    facts = json.loads((Path(spec.out) / "evaluation.json").read_text())["real"]
    assert facts["sha256"] == open_dataset(load_config(made.teacher).data.images).description.sha256
    assert evaluate(spec) == [real, decoded, teacher, *students]


def test_a_study_measures_images_and_leaves_out_the_speed_limit(made: Made, tmp_path: Path):
    gaussian = tmp_path / "gaussian"
    config = load_config(made.teacher)
    teach(teach_spec(gaussian, data=config.data, network=config.network, optimizer=LONGER, path="gaussian"))
    found = study(
        StudySpec(
            teacher=made.teacher,
            store=made.store,
            students=(made.student,),
            rivals=(str(gaussian),),
            claims=("all",),
            samples=40,
            out=str(tmp_path / "study"),
        )
    )
    assert set(found) == set(CLAIMS)
    left_out = {claim for claim, text in found.items() if text.startswith("left out")}
    assert left_out == {"speed", "plane"}


def test_a_logged_model_contains_its_autoencoder(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = run_of_output(made.student)
    assert run is not None
    model = model_of_run(TrackedRun(os.environ["MLFLOW_TRACKING_URI"], run.run_id))
    assert model is not None
    expected = load_model(made.student).sample(3, labels=[1], seed=2).images.numpy()
    hidden = Path(made.autoencoder).rename(tmp_path / "hidden")
    open_autoencoder.cache_clear()
    try:
        loaded = mlflow.pyfunc.load_model(model.model_uri)
        images = loaded.predict(pandas.DataFrame({"label": [1, 1, 1]}), params={"seed": 2})
        assert np.array_equal(images, expected)
        with pytest.raises(ArgumentError, match="autoencoder"):
            load_model(made.student).sample(1)
        with pytest.raises(ArgumentError, match="autoencoder"):
            distill(distill_spec(made.store, tmp_path / "s"))
    finally:
        hidden.rename(made.autoencoder)


def test_a_changed_autoencoder_is_refused(made: Made, tmp_path: Path):
    kept = {path: path.read_bytes() for path in Path(made.autoencoder).iterdir()}
    autoencoders.write(Path(made.autoencoder), latent_channels=4, seed=5)
    open_autoencoder.cache_clear()
    try:
        with pytest.raises(DistillKacError, match="has changed"):
            load_model(made.student).sample(1)
        with pytest.raises(DistillKacError, match="has changed"):
            evaluate(EvaluateSpec(teacher=made.teacher, samples=100, actors=0, out=str(tmp_path / "e")))
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
        open_autoencoder.cache_clear()


def test_relative_paths_of_the_data_and_of_the_autoencoder_become_absolute(tmp_path: Path):
    data = {"kind": "folder", "root": "photos", "autoencoder": "vae"}
    resolved = resolve_spec(teach_spec(tmp_path / "t", data=data)).data
    assert (resolved.root, resolved.autoencoder) == (str(Path("photos").absolute()), str(Path("vae").absolute()))


def test_a_bounded_network_is_refused(made: Made, tmp_path: Path):
    data = {"kind": "digits", "autoencoder": made.autoencoder}
    with pytest.raises(ArgumentError, match=r"network\.bounded"):
        teach_spec(tmp_path / "t", data=data, network={"kind": "mlp", "bounded": True})
