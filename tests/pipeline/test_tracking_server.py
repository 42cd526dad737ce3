"""Runs on a real MLflow server over HTTP, with an outage and several concurrent writers."""

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import tracking
from pipeline.config import SampleSpec
from pipeline.teach import teach
from pipeline.tracking import delivery, start_run
from tests.pipeline.stages import teach_spec
from tests.pipeline.tracking_servers import Line, mlflow_server, postgresql, postgresql_programs

SPEC = SampleSpec(model="m", out="o.png")
AWAY_SECONDS = float(os.environ.get("DISTILLKAC_TEST_AWAY_SECONDS", "4"))


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server itself. Its database is PostgreSQL if PostgreSQL is installed."""
    folder, programs = tmp_path_factory.mktemp("server"), postgresql_programs()
    if programs is None:
        with mlflow_server(folder, f"sqlite:///{folder}/server.db") as uri:
            yield uri
    else:
        with postgresql(programs) as database, mlflow_server(folder, database) as uri:
            yield uri


@pytest.fixture
def line(direct: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    line = Line(int(direct.rsplit(":", 1)[1]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", line.uri)
    yield line
    line.cut()


def test_a_run_and_its_nested_run_reach_the_server(line: Line, tmp_path: Path):
    importlib.import_module("pipeline.training")
    outer_run = {"spec": SPEC, "output": str(tmp_path), "fingerprint": "f1", "inputs": {}, "name": "outer"}
    inner_run = {**outer_run, "fingerprint": "f2", "inputs": {"rollout": "f0"}, "name": "inner", "stage": "distill"}
    data = tracking.LoggedDataset("store", "0123456789abcdef" * 4, "s3://bucket/store")
    with start_run(**outer_run) as outer:
        assert outer.tracking_uri == line.uri
        with start_run(**inner_run, parent=outer, datasets=[data]) as inner:
            inner.metrics({"loss": 0.5}, step=1)
            inner.metrics({"loss": 0.25}, step=2)
            inner.artifact("samples.png", b"\x89PNG")
    client, _ = tracking.connect(line.uri)
    run = client.get_run(inner.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == outer.run_id
    assert run.data.tags[f"{tracking.INPUT_TAG}rollout"] == "f0"
    assert run.data.params["out"] == "o.png"
    assert [(m.step, m.value) for m in client.get_metric_history(inner.run_id, "loss")] == [(1, 0.5), (2, 0.25)]
    assert [file.path for file in client.list_artifacts(inner.run_id)] == ["samples.png"]
    assert run.inputs.dataset_inputs[0].dataset.source_type == "s3"
    with start_run(**{**outer_run, "spec": SampleSpec(model="another", out="o.png")}) as again:
        assert again == outer
    run = client.get_run(outer.run_id)
    assert (run.info.status, run.data.params["model"]) == ("FINISHED", "m")
    assert run.data.tags["distillkac.rerun.model"] == "another"


WRITERS = """
import os, sys, time
from pathlib import Path
import mlflow
import pipeline.training
from kac.util.log import show
from pipeline import tracking
from pipeline.config import SampleSpec

show()
parent, folder, seconds = tracking.TrackedRun(sys.argv[1], sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
number = next((number for number in range(4) if os.fork() == 0), None)
if number is None:
    sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(4)))
with tracking.start_run(
    spec=SampleSpec(model="m", out="o"), fingerprint=str(number), inputs={}, output=f"{folder}/{number}", parent=parent
) as run:
    for step in range(1, 201):
        run.metrics({"loss": number + 1 / step, "learning_rate": float(step)}, step=step)
        if step == 20:
            (folder / f"writes-{number}").touch()
        if step == 100:
            run.artifact("half.txt", str(number).encode())
        time.sleep(seconds / 200)
"""


def test_four_writers_lose_nothing_while_the_server_is_away(line: Line, tmp_path: Path, project_root: Path):
    """Every point is stored once, although the server goes away and its last responses are lost."""
    if postgresql_programs() is None:
        pytest.skip("PostgreSQL is not installed (Debian package: postgresql)")
    importlib.import_module("pipeline.training")
    outer_run = {"spec": SPEC, "output": str(tmp_path), "fingerprint": "outer", "inputs": {}, "name": "outer"}
    with start_run(**outer_run) as outer:
        command = [sys.executable, "-c", WRITERS, line.uri, outer.run_id, str(tmp_path), str(AWAY_SECONDS + 4)]
        writers = subprocess.Popen(command, cwd=project_root, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("writes-*"))) < 4 and writers.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        line.cut()
        time.sleep(AWAY_SECONDS)
        line.join()
        errors = writers.communicate(timeout=120)[1]
        assert writers.returncode == 0, errors
    assert delivery.delivery_to(line.uri).flush(20)
    assert errors.count("does not answer") == 4, errors
    client, experiment = tracking.connect(line.uri)
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{outer.run_id}'")
    assert sorted(child.data.tags[tracking.FINGERPRINT_TAG] for child in children) == ["0", "1", "2", "3"]
    for child in children:
        number = int(child.data.tags[tracking.FINGERPRINT_TAG])
        history = client.get_metric_history(child.info.run_id, "loss")
        assert sorted((m.step, m.value) for m in history) == [(step, number + 1 / step) for step in range(1, 201)]
        assert len(client.get_metric_history(child.info.run_id, "learning_rate")) == 200
        assert child.info.status == "FINISHED"
        assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["half.txt"]
    assert client.get_run(outer.run_id).info.status == "FINISHED"


def test_a_password_in_the_address_is_never_written(
    direct: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", direct.replace("//", "//me:correct-horse-battery@"))
    monkeypatch.setenv("DISTILLKAC_CACHE", str(tmp_path / "cache"))
    config = teach(teach_spec(tmp_path / "teacher"))
    assert config is not None
    client, experiment = tracking.connect(direct)
    (run,) = client.search_runs([experiment], f"tags.`{tracking.FINGERPRINT_TAG}` = '{config.fingerprint}'")
    assert run.info.status == "FINISHED"
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert b"127.0.0.1" in written[str(tmp_path / "teacher" / tracking.RUN_FILE)]
    written |= {"printed": "".join(capfd.readouterr()).encode(), "run": str(run.to_dictionary()).encode()}
    assert [name for name, data in written.items() if b"correct-horse" in data] == []
