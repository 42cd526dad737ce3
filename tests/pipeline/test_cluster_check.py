"""jobs.cluster check: a line for what is well and for what is not, before anything is submitted."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kac.util.errors import ArgumentError, DistillKacError
from pipeline.cluster import joining
from pipeline.cluster.check import CheckSpec, check, job_server


@pytest.fixture
def address(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> str:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return f"http://{ray._private.worker._global_node.webui_url}"


class Silent(BaseHTTPRequestHandler):
    """Refuses a token, as the path says, or is no job server."""

    def do_GET(self) -> None:
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def other() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
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


def test_all_is_well(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = lines_of(capsys, CheckSpec(address=address, paths=(str(tmp_path),)), failed=0)
    assert lines[0].startswith(f"ok     cluster {address}: {joining.versions_here()}, as here; 1 x (2 CPU")
    assert lines[1] == (
        f"ok     {tmp_path}: written and read here; where there are more machines it needs s3://, or "
        "DISTILLKAC_SHARED_FOLDERS"
    )
    assert lines[2].startswith("ok     mlflow: no server (MLFLOW_TRACKING_URI)")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_well_is_said_line_by_line(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    spec = CheckSpec(address=address, paths=("/proc/none", "s3://"), gpus=8)
    cluster, path, bucket, mlflow = lines_of(capsys, spec, failed=4)
    assert cluster.startswith(f"error  cluster {address}: expected 8 GPUs, found 1 x (2 CPU")
    assert path.startswith("error  /proc/none: expected a place that can be written to, found: ")
    assert bucket == "error  s3://: expected s3://BUCKET/PREFIX, found no bucket"
    assert mlflow.startswith("error  mlflow: expected a tracking server at http://127.0.0.1:9, found: ")
    assert "hunter2" not in mlflow


@pytest.mark.parametrize(
    ("status", "found"),
    [
        (403, "expected to be let in, found that it refuses the token of "),
        (200, "expected the job server of Ray at http://127.0.0.1:{port}, found status 200 of something else"),
    ],
)
def test_a_server_that_is_none_or_refuses_the_token(
    status: int,
    found: str,
    ray_cluster: None,
    other: ThreadingHTTPServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    other.status = status  # type: ignore[attr-defined]
    port = other.server_address[1]
    first, *_ = lines_of(capsys, CheckSpec(address=f"http://127.0.0.1:{port}"), failed=1)
    assert found.format(port=port) in first


def test_nobody_is_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    first, *_ = lines_of(capsys, CheckSpec(address="http://127.0.0.1:9"), failed=1)
    assert "expected a job server at http://127.0.0.1:9, found that nobody answers: start the cluster" in first


def test_the_address_is_that_of_ray_job_submit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert job_server(None) == "http://127.0.0.1:8265"
    assert job_server("https://ray.example/") == "https://ray.example"
    assert job_server("10.0.0.1:6379") == job_server("ray://10.0.0.1:10001") == "http://10.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert job_server(None) == job_server("http://head:8265/") == "http://head:8265"
    with pytest.raises(
        ArgumentError, match="--address: expected that RAY_ADDRESS is not set, which ray job submit goes"
    ):
        job_server("http://other:8265")
