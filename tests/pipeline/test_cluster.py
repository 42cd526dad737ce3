"""Joining a cluster: the addresses and paths that are refused, and the ports that an embedded Ray opens."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from kac.util.errors import ArgumentError, DistillKacError
from pipeline.cluster import connection as cluster
from pipeline.cluster import placement, storage
from pipeline.config import EvaluateSpec, SweepSpec
from pipeline.distill import distill
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.rollout import rollout
from pipeline.sweep import sweep
from pipeline.teach import teach
from tests.pipeline.stages import distill_spec, teach_spec
from tests.pipeline.stores import make_spec


def refusal(address: str) -> str:
    with pytest.raises(DistillKacError) as refused:
        cluster.check_address(address)
    return str(refused.value)


@contextmanager
def listening() -> Iterator[socket.socket]:
    """Open a port that accepts one connection and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        yield server


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("http://head:8265", "ray job submit --address http://head:8265"),
        ("https://head/ray", "ray job submit --address http://head:8265"),
        ("ray://head:10001", "ray job submit --address http://head:8265"),
        ("10.0.0.1", "HOST:PORT"),
        ("127.0.0.1:9", "ray start --head"),
        ("no.such.host.invalid:6379", "ray start --head"),
    ],
)
def test_an_address_of_a_wrong_kind_or_without_a_server_is_refused(address: str, advice: str):
    message = refusal(address)
    assert message.startswith(f"{cluster.RAY_ADDRESS} is {address}") and advice in message


def test_a_server_that_drops_packets_or_never_answers_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "CHECK_SECONDS", 0.5)
    with listening() as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "no answer in 0 s" in refusal(address)
        with contextlib.ExitStack() as held, contextlib.suppress(TimeoutError):
            for _ in range(5):  # fill its queue, after which it drops packets, like a firewall
                held.enter_context(socket.create_connection(server.getsockname(), timeout=0.2))
        assert "no answer in 0 s" in refusal(address)


TOKENS = """
import os, sys
from pipeline.cluster import connection
from kac.util.errors import DistillKacError
from ray._raylet import AuthenticationTokenLoader, Config
for case in ({}, {"RAY_AUTH_TOKEN": "a-wrong-token-for-certain"}, {"HOME": "/nowhere"}, {"RAY_AUTH_MODE": "disabled"}):
    os.environ.update(case)
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")
    try:
        connection.check_address(sys.argv[1])
        print("accepted")
    except DistillKacError as error:
        print(error)
    for name in case:
        os.environ.pop(name)
    os.environ.update(HOME=sys.argv[2], RAY_AUTH_MODE="token")
"""


def test_a_wrong_or_missing_token_is_refused(ray_cluster: None, project_root: Path):
    import ray

    address, home = ray.get_runtime_context().gcs_address, os.environ["HOME"]
    done = subprocess.run(
        [sys.executable, "-c", TOKENS, address, home], cwd=project_root, capture_output=True, text=True, check=True
    )
    accepted, wrong, missing, disabled = done.stdout.splitlines()
    assert accepted == "accepted"
    for line in (wrong, missing, disabled):
        assert "RAY_AUTH_MODE=token" in line and "RAY_AUTH_TOKEN" in line and "ray get-auth-token" in line
    assert "a-wrong-token" not in done.stdout + done.stderr


def test_other_versions_and_a_machine_outside_the_cluster_are_refused(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    import ray

    address = ray.get_runtime_context().gcs_address
    with monkeypatch.context() as patch:
        patch.setattr("ray._private.services.find_node_ids", set)
        message = refusal(address)
        assert "none of the cluster's 1 nodes" in message and "ray job submit" in message
    monkeypatch.setattr(ray, "__version__", "2.58.1")
    message = refusal(address)
    assert f"{cluster.RAY_ADDRESS} {address} has Ray 2." in message and "this process has Ray 2.58.1 with" in message


def test_an_embedded_ray_listens_only_on_this_machine(ray_cluster: None):
    ports: dict[str, set[str]] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                ports.setdefault(connection.laddr.ip.removeprefix("::ffff:"), set()).add(process.name())
    assert any("raylet" in names for names in ports.values())
    assert set(ports) <= {"127.0.0.1", "::1"}, ports


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> None:
    """The test session's cluster, which appears to have a second machine."""
    monkeypatch.setattr(placement, "several_machines", lambda: "2 machines")


def stages(folder: Path, store: str, teacher: str, out: Path) -> dict[str, Any]:
    return {
        "teach": lambda: teach(teach_spec(out, workers=1)),
        "rollout": lambda: rollout(make_spec(out, teacher, actors=1)),
        "distill": lambda: distill(distill_spec(store, out, workers=1)),
        "sweep": lambda: sweep(SweepSpec(store=store, out=str(out), steps=(1,))),
        "evaluate": lambda: evaluate(EvaluateSpec(teacher=teacher, out=str(out), samples=50, actors=1)),
    }


@pytest.mark.parametrize("stage", ["teach", "rollout", "distill", "sweep", "evaluate"])
def test_a_local_path_is_refused_on_two_machines(
    stage: str, two_machines: None, small_store: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """If all folders are declared as shared, a local MLflow database is still refused."""
    run = stages(tmp_path, small_store, teacher, tmp_path / "out")[stage]
    with pytest.raises(ArgumentError, match="2 machines") as refused:
        run()
    assert refused.value.name in {"out", "store"} and storage.SHARED_VARIABLE in str(refused.value)
    assert not (tmp_path / "out").exists()
    if stage in {"teach", "distill", "sweep"}:
        monkeypatch.setenv(storage.SHARED_VARIABLE, f"/nowhere:{os.path.dirname(teacher)}:{small_store}:{tmp_path}/")
        with pytest.raises(DistillKacError, match=r"2 machines.*MLFLOW_TRACKING_URI"):
            run()


def test_work_in_this_process_may_use_local_paths(two_machines: None, teacher: str, tmp_path: Path):
    assert rollout(make_spec(tmp_path / "store", teacher, actors=0)) is not None


def test_a_worker_does_not_repeat_the_check_of_its_driver(two_machines: None):
    import ray

    @ray.remote(num_cpus=0)
    def check_in_worker() -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(placement, "several_machines", lambda: "2 machines")
            storage.check_shared({"`out`": "/local"}, lambda: True)
        return True

    with pytest.raises(ArgumentError, match=r"`out`.*/local"):
        storage.check_shared({"`out`": "/local"}, lambda: True)
    assert ray.get(check_in_worker.remote())


def test_shared_folders_and_uris_are_shared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(storage.SHARED_VARIABLE, "/mnt/efs/:/home")
    for path in ("/mnt/efs", "/mnt/efs/a/b", "file:///home/me", "s3://bucket/a"):
        assert storage.is_shared(path)
    for path in ("/mnt/efs2/a", "/mnt/efs/../local", "/tmp/a"):
        assert not storage.is_shared(path)
    monkeypatch.setenv(storage.SHARED_VARIABLE, "efs")
    with pytest.raises(ArgumentError, match=f"{storage.SHARED_VARIABLE} has efs"):
        storage.is_shared("/tmp/a")


def test_a_cluster_with_an_autoscaler_counts_as_several_machines(ray_cluster: None, monkeypatch: pytest.MonkeyPatch):
    assert placement.several_machines() == ""
    import ray

    nodes = [{**node, "Labels": {placement.NODE_GROUP_LABEL: "head"}} for node in ray.nodes()]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert placement.several_machines() == "1 machine and an autoscaler"


@pytest.mark.ray
@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_too_long_for_sockets_is_named(variable: str, tmp_path: Path, project_root: Path):
    """Run the job in another process, because this process may already have started Ray."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    options = ["--data", "moons", "--workers", "1", "--out", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name not in {"RAY_ADDRESS", "RAY_TMPDIR"}}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.teach", *options],
        cwd=project_root,
        env={**environment, variable: str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert f"error: {variable}: " in line and str(folder) in line
    assert not (tmp_path / "out" / "config.json").exists()
