"""Logged models load anywhere and draw the images of ``jobs.sample``. Logging never makes a training run fail."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException

from kac.model import load_config
from kac.util.errors import ArgumentError, DistillKacError
from pipeline import tracking
from pipeline.config import SampleSpec
from pipeline.distill import distill
from pipeline.sample import sample
from pipeline.tracking import TrackedRun, logged_models
from pipeline.tracking.logged_models import log_finished, log_model, model_of_run, register
from tests.pipeline.stages import FEW, distill_spec, run_of
from tests.pipeline.stores import make_store, make_teacher

FLOW_MAP: dict[str, Any] = {
    "objective": {"kind": "flow-map", "grids": (1, 2, 4)},
    "guidance": "all",
    "steps": 4,
    "register": "digits",
}
MISSING_DATA = {"kind": "folder", "root": "/nowhere/at/all"}

LOAD = """
import json, sys
import mlflow, numpy, pandas
uri, cases, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = mlflow.pyfunc.load_model(uri)
images = [model.predict(pandas.DataFrame({"label": labels}), params=params) for labels, params in cases]
numpy.savez(out, *images)
print([name for name in ("ray", "pipeline", "jobs", "sklearn") if name in sys.modules], sys.modules["kac"].__file__)
"""


@pytest.fixture(scope="module")
def digits_store(tmp_path_factory: pytest.TempPathFactory, tracking_database: str) -> str:
    folder = tmp_path_factory.mktemp("digits")
    make_store(folder / "store", make_teacher(folder / "teacher", "digits"), trajectories=128, guidance=(0.0, 1.0))
    return str(folder / "store")


@pytest.fixture(scope="module")
def flow_map(tmp_path_factory: pytest.TempPathFactory, digits_store: str) -> str:
    """A logged and registered any-step student of the digits, for all guidance scales."""
    out = tmp_path_factory.mktemp("flow_map") / "student"
    distill(distill_spec(digits_store, out, **FLOW_MAP))
    return str(out)


@pytest.fixture(scope="module")
def logged(flow_map: str) -> LoggedModel:
    return model_of(flow_map)


def run_that_made(student: str) -> TrackedRun:
    run = run_of("distill", load_config(student).fingerprint)
    return TrackedRun(os.environ["MLFLOW_TRACKING_URI"], run.info.run_id)


def model_of(student: str) -> LoggedModel:
    model = model_of_run(run_that_made(student))
    assert model is not None
    return model


def artifact_of(model: LoggedModel) -> Path:
    return Path(str(model.artifact_location).removeprefix("file://"))


def sampled(out: Path, **options: Any) -> Any:
    sample(SampleSpec(out=str(out), **options))
    with np.load(out) as samples:
        return samples["images"]


def elsewhere(tmp_path: Path) -> dict[str, Any]:
    """Return `subprocess` options for a process that has the installed packages but not this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return {"cwd": tmp_path, "env": {**environment, "PATH": programs}}


def test_a_fresh_process_draws_the_images_of_jobs_sample_to_the_bit(logged: LoggedModel, flow_map: str, tmp_path: Path):
    cases = [
        ([-1] * 600, {"seed": 7}, {"count": 600, "seed": 7}),
        ([3, 1, 3, 1, 3], {"steps": 2, "guidance": 0.5}, {"count": 5, "labels": (3, 1), "steps": 2, "guidance": 0.5}),
    ]
    requests = json.dumps([(labels, params) for labels, params, _ in cases])
    command = [sys.executable, "-c", LOAD, logged.model_uri, requests, "made.npz"]
    done = subprocess.run(command, **elsewhere(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported, origin = done.stdout.rsplit("\n", 2)[-2].split(" ", 1)
    assert imported == "[]"
    assert Path(origin).is_relative_to(artifact_of(logged) / "code")
    with np.load(tmp_path / "made.npz") as made:
        for number, (_, _, options) in enumerate(cases):
            images = made[f"arr_{number}"]
            assert images.dtype == np.float32
            np.testing.assert_array_equal(images, sampled(tmp_path / "sample.npz", model=flow_map, **options))


def test_a_server_answers_with_the_images_of_jobs_sample(flow_map: str, logged: LoggedModel, tmp_path: Path):
    register(run_that_made(flow_map), "served", "best")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["models", "serve", "-m", "models:/served@best", "--env-manager", "local", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *options, "--workers", "1"],
            **elsewhere(tmp_path),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        example = json.loads((artifact_of(logged) / "serving_input_example.json").read_text())
        request = {**example, "params": {"seed": 3, "steps": 1}}
        url = f"http://127.0.0.1:{port}/invocations"
        answer = json.loads(ask(url, request, server))
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(url, {"dataframe_split": {"columns": ["label"], "data": [[10]]}}, server)
        message = json.loads(refused.value.read())["message"]
        assert "label" in message and "10" in message
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    images = np.array(answer["predictions"], np.float32)
    of_classes = sampled(tmp_path / "a.npz", model=flow_map, count=3, seed=3, steps=1, labels=(0, 9, 5))
    of_any = sampled(tmp_path / "b.npz", model=flow_map, count=3, seed=3, steps=1)
    np.testing.assert_array_equal(images[:2], of_classes[:2])
    np.testing.assert_array_equal(images[2], of_any[2])


def ask(url: str, content: dict[str, Any], server: "subprocess.Popen[bytes]") -> bytes:
    """Wait until the server runs, and return its answer."""
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    for _ in range(600):
        assert server.poll() is None, "the server has stopped: see its log"
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bytes(answer.read())
        except ConnectionError:
            time.sleep(0.2)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            assert isinstance(error.reason, ConnectionError), error
            time.sleep(0.2)
    raise AssertionError("the server did not come up")


def test_a_model_is_code_and_safetensors_with_tags_of_its_origin(logged: LoggedModel, flow_map: str, digits_store: str):
    found, config = MlflowClient().get_logged_model(logged.model_id), load_config(flow_map)
    folder = artifact_of(logged)
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {"", ".py", ".json", ".yaml", ".txt", ".safetensors"}
    description = (folder / "MLmodel").read_text()
    assert "python_model:" not in description
    assert str(logged_models.CODE_FILE.parent) not in description
    assert (folder / "artifacts/model/model.safetensors").read_bytes() == Path(
        flow_map, "model.safetensors"
    ).read_bytes()
    teacher = str(Path(digits_store).with_name("teacher"))
    assert found.status == "READY"
    assert {
        "distillkac.fingerprint": config.fingerprint,
        "distillkac.weights_sha256": config.weights_sha256,
        "distillkac.store_fingerprint": config.store_fingerprint,
        "distillkac.teacher_sha256": config.teacher_sha256,
        "distillkac.store": digits_store,
        "distillkac.teacher": teacher,
        "distillkac.path": flow_map,
    }.items() <= found.tags.items()
    run = MlflowClient().get_run(found.source_run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    assert found.params == run.data.params
    # A run that takes longer than two seconds also has system metrics, which the model does not copy.
    expected = {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")}
    assert {metric.key: metric.value for metric in found.metrics} == expected
    names = (folder / "requirements.txt").read_text()
    assert "torch==" in names
    assert "+" not in names
    model = mlflow.pyfunc.load_model(logged.model_uri)
    assert str(model.metadata.signature.inputs) == "['label': long (required)]"
    assert model.metadata.signature.params.to_dict()[1]["default"] == 4
    assert model.predict(model.input_example, params={"steps": 1}).shape == (3, 1, 8, 8)


def test_a_model_needs_no_files_of_its_dataset(flow_map: str, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(Path(flow_map, name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "data": MISSING_DATA}))
    client = MlflowClient()
    run = client.create_run(client.get_experiment_by_name(tracking.experiment_name()).experiment_id)
    tracked = TrackedRun(os.environ["MLFLOW_TRACKING_URI"], run.info.run_id)
    model = log_model(tracked, str(tmp_path), load_config(str(tmp_path)), {})
    assert mlflow.pyfunc.load_model(model.model_uri).predict({"label": [-1, -1]}).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("labels", "params", "message"),
    [
        ([10], {}, r"label.*10"),
        ([-2], {}, r"label.*-2"),
        ([0], {"seed": -1}, "seed.*-1.*2147483647"),
        ([0], {"steps": -1}, "steps.*-1"),
        ([0], {"guidance": 9.0}, "guidance.*0.0.*1.0"),
    ],
)
def test_labels_and_params_that_a_model_does_not_support_are_refused(
    labels: list[int], params: dict[str, Any], message: str, logged: LoggedModel
):
    model = mlflow.pyfunc.load_model(logged.model_uri)
    assert model.predict({"label": np.zeros(0, np.int64)}).shape == (0, 1, 8, 8)
    with pytest.raises(MlflowException, match=message):
        model.predict({"label": np.array(labels)}, params=params)


def test_registering_a_student_again_adds_no_version(logged: LoggedModel, flow_map: str, digits_store: str):
    client = MlflowClient()
    distill(distill_spec(digits_store, Path(flow_map), **FLOW_MAP))
    run = run_that_made(flow_map)
    assert register(run, "digits") == register(run, "digits", alias="best") == "1"
    assert [version.version for version in client.search_model_versions("name = 'digits'")] == [1]
    assert client.get_model_version_by_alias("digits", "best").run_id == run.run_id
    versions = json.loads(client.get_logged_model(logged.model_id).tags["mlflow.modelVersions"])
    assert {"name": "digits", "version": 1} in versions


def test_logging_does_not_change_the_mlflow_state_of_the_process(student: str, tmp_path: Path):
    own = f"sqlite:///{tmp_path / 'own.db'}"
    before, run, config = mlflow.get_tracking_uri(), run_that_made(student), load_config(student)
    client = MlflowClient(run.tracking_uri)
    models: list[LoggedModel] = []

    def log(name: str) -> None:
        tags = {"distillkac.stage": "test"}
        created = client.create_run(client.get_run(run.run_id).info.experiment_id, tags=tags, run_name=name)
        models.append(log_model(TrackedRun(run.tracking_uri, created.info.run_id), student, config, {}))

    mlflow.set_tracking_uri(own)
    try:
        with mlflow.start_run() as active:
            threads = [threading.Thread(target=log, args=(str(number),)) for number in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            current = mlflow.active_run()
            assert current is not None
            assert current.info.run_id == active.info.run_id
            assert mlflow.get_tracking_uri() == own
            assert mlflow.get_active_model_id() is None
        assert MlflowClient(own).search_logged_models(["0"]) == []
    finally:
        mlflow.set_tracking_uri(before)
    assert len({model.model_id for model in models}) == 3


def test_a_failing_server_causes_only_a_warning(
    small_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: Any) -> None:
        raise OSError("no space left\non the server")

    spec = distill_spec(small_store, tmp_path / "out", optimizer=FEW.model_copy(update={"updates": 2}), register="late")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", refuse)
        config = distill(spec)
    warning = f"warning: {tmp_path / 'out'} is complete, but MLflow"
    assert [line for line in capsys.readouterr().err.splitlines() if warning in line and "no space left" in line]
    assert config == load_config(str(tmp_path / "out"))
    run = run_that_made(str(tmp_path / "out"))
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"
    with pytest.raises(DistillKacError, match=run.run_id):
        register(run, "late")
    distill(spec)  # the same command again, when the server works
    assert MlflowClient().get_model_version("late", "1").run_id == run.run_id
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log_finished(TrackedRun("http://127.0.0.1:1", "none"), spec, config)
    assert f"{warning} (http://127.0.0.1:1)" in capsys.readouterr().err


def test_names_that_mlflow_does_not_accept_are_refused_before_training(small_store: str, tmp_path: Path):
    with pytest.raises(ArgumentError, match="a/b") as refused:
        distill_spec(small_store, tmp_path / "out", register="a/b")
    assert refused.value.name == "register"
