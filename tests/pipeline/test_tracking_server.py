"""Runs on a real MLflow server, over HTTP."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import tracking
from pipeline.config import SampleSpec
from pipeline.tracking import start_run

START_SECONDS = 180


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "files"),
    ]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen([*command, *stores], stdout=log, stderr=log, start_new_session=True)
        try:
            uri = f"http://127.0.0.1:{port}"
            _wait_until_healthy(uri, process)
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            yield uri
        finally:
            os.killpg(process.pid, 15)
            process.wait(30)


def _wait_until_healthy(uri: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server at {uri} did not become healthy")


def test_a_run_and_its_nested_run_reach_the_server(server: str, tmp_path: Path):
    from mlflow import MlflowClient

    spec = SampleSpec(model="m", out="o.png")
    outer_run = {"spec": spec, "output": str(tmp_path), "fingerprint": "f1", "inputs": {}, "name": "outer"}
    inner_run = {**outer_run, "fingerprint": "f2", "inputs": {"rollout": "f0"}, "name": "inner", "stage": "distill"}
    with start_run(**outer_run) as outer:
        assert outer.tracking_uri == server
        with start_run(**inner_run, parent=outer) as inner:
            inner.metrics({"loss": 0.5}, step=1)
            inner.metrics({"loss": 0.25}, step=2)
            inner.artifact("samples.png", b"\x89PNG")
    client = MlflowClient(server)
    run = client.get_run(inner.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == outer.run_id
    assert run.data.tags[f"{tracking.INPUT_TAG}rollout"] == "f0"
    assert run.data.params["out"] == "o.png"
    assert [(m.step, m.value) for m in client.get_metric_history(inner.run_id, "loss")] == [(1, 0.5), (2, 0.25)]
    assert [file.path for file in client.list_artifacts(inner.run_id)] == ["samples.png"]
