"""jobs.cluster check: one line per check, with the result or the problem."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kac.util.errors import ArgumentError, DistillKacError
from pipeline.cluster.check import CheckSpec, check, job_server


@pytest.fixture
def address(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> str:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return f"http://{ray._private.worker._global_node.webui_url}"


class StatusOnly(BaseHTTPRequestHandler):
    """Answers every request with the server's ``status`` and no content."""

    def do_GET(self) -> None:
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def other() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StatusOnly)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def lines_of(capsys: pytest.CaptureFixture[str], spec: CheckSpec, failed: int) -> list[str]:
    if failed:
        with pytest.raises(DistillKacError, match=f"{failed} of .* checks failed"):
            check(spec)
    else:
        check(spec)
    return capsys.readouterr().out.splitlines()


def test_successful_checks_log_ok(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = lines_of(capsys, CheckSpec(address=address, paths=(str(tmp_path),)), failed=0)
    assert re.match(f"ok     cluster {address}: Ray .* with Python .*, as here; 2 CPU, 0 GPU", lines[0])
    assert lines[1].startswith(f"ok     {tmp_path}: ") and "DISTILLKAC_SHARED_FOLDERS" in lines[1]
    assert lines[2].startswith("ok     mlflow: no server")
    assert list(tmp_path.iterdir()) == []


def test_failed_checks_log_their_problem(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    spec = CheckSpec(address=address, paths=("/proc/none", "s3://"), gpus=8)
    cluster, path, bucket, mlflow = lines_of(capsys, spec, failed=4)
    assert cluster.startswith(f"error  cluster {address}: ") and "0 of 8 GPUs: 2 CPU" in cluster
    assert path.startswith("error  /proc/none: ")
    assert bucket.startswith("error  s3://: ") and "s3://BUCKET" in bucket
    assert mlflow.startswith("error  mlflow: ") and "http://127.0.0.1:9" in mlflow
    assert "hunter2" not in mlflow


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (403, "the token is "),
        (200, "http://127.0.0.1:{port} (JSONDecodeError)"),
    ],
)
def test_a_server_that_is_not_ray_or_refuses_the_token_is_reported(
    status: int,
    problem: str,
    ray_cluster: None,
    other: ThreadingHTTPServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    other.status = status  # type: ignore[attr-defined]
    port = other.server_address[1]
    first, *_ = lines_of(capsys, CheckSpec(address=f"http://127.0.0.1:{port}"), failed=1)
    assert problem.format(port=port) in first


def test_an_address_without_a_server_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    first, *_ = lines_of(capsys, CheckSpec(address="http://127.0.0.1:9"), failed=1)
    assert first.startswith("error  cluster http://127.0.0.1:9: ")


def test_the_address_is_found_as_by_ray_job_submit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert job_server(None) == "http://127.0.0.1:8265"
    assert job_server("https://ray.example/") == "https://ray.example"
    assert job_server("10.0.0.1:6379") == job_server("ray://10.0.0.1:10001") == "http://10.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert job_server(None) == job_server("http://head:8265/") == "http://head:8265"
    with pytest.raises(ArgumentError, match="RAY_ADDRESS") as refused:
        job_server("http://other:8265")
    assert refused.value.name == "address"


def test_a_check_without_an_answer_does_not_keep_the_process_alive(monkeypatch: pytest.MonkeyPatch):
    """A mount that hangs would otherwise delay the end of the process without limit."""
    is_over = threading.Event()
    monkeypatch.setattr("pipeline.cluster.check.MAX_SECONDS", 0.1)
    monkeypatch.setattr("pipeline.cluster.check._check_tracking", is_over.wait)
    before = set(threading.enumerate())
    with pytest.raises(DistillKacError, match="checks failed"):
        check(CheckSpec(address="http://127.0.0.1:1"))
    alive = set(threading.enumerate()) - before
    assert alive and all(thread.daemon for thread in alive)
    is_over.set()
