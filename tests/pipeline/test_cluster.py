"""Joining a cluster: what is refused, and how it is said; and what an embedded one shows to others."""

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
from pipeline.cluster import joining, storage
from pipeline.cluster.connection import Machines
from pipeline.config.specs import EvaluateSpec, SweepSpec
from pipeline.distill import distill
from pipeline.evaluate.stage import evaluate
from pipeline.rollout import rollout
from pipeline.sweep import sweep
from pipeline.teach import teach
from tests.pipeline.stages import distill_spec, teach_spec
from tests.pipeline.stores import make_spec


def refusal(address: str) -> str:
    with pytest.raises(DistillKacError) as refused:
        joining.check_address(address)
    return str(refused.value)


@contextmanager
def listening() -> Iterator[socket.socket]:
    """A port at which nobody says a word: one connection waits, others are not taken."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        yield server


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("http://head:8265", "found http://, the address of its job server: submit the job there: ray job submit"),
        ("https://head/ray", "--address http://head:8265"),
        ("ray://head:10001", "found ray://, Ray Client, under which Ray Train does not run: submit the job: ray job"),
        ("10.0.0.1", "expected HOST:PORT, found 10.0.0.1"),
        ("127.0.0.1:9", "found that nobody answers there"),
        ("no.such.host.invalid:6379", "found that nobody answers there"),
    ],
)
def test_an_address_of_another_kind_or_of_nobody_is_refused(address: str, found: str):
    assert found in refusal(address)


def test_a_machine_that_drops_packets_and_one_that_says_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joining, "SECONDS", 0.5)
    with listening() as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "expected a Ray cluster at" in refusal(address)
        with contextlib.ExitStack() as held, contextlib.suppress(TimeoutError):
            for _ in range(5):  # until its queue is full: then it drops packets, as a firewall does
                held.enter_context(socket.create_connection(server.getsockname(), timeout=0.2))
        assert "nobody answers there (no answer in" in refusal(address)


TOKENS = """
import os, sys
from pipeline import joining
from kac.errors import DistillKacError
from ray._raylet import AuthenticationTokenLoader, Config
for case in ({}, {"RAY_AUTH_TOKEN": "a-wrong-token-for-certain"}, {"HOME": "/nowhere"}, {"RAY_AUTH_MODE": "disabled"}):
    os.environ.update(case)
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")
    try:
        joining.check_address(sys.argv[1])
        print("taken")
    except DistillKacError as error:
        print(error)
    for name in case:
        os.environ.pop(name)
    os.environ.update(HOME=sys.argv[2], RAY_AUTH_MODE="token")
"""


def test_a_wrong_and_a_missing_token(ray_cluster: None, project_root: Path):
    import ray

    address, home = ray.get_runtime_context().gcs_address, os.environ["HOME"]
    ended = subprocess.run(
        [sys.executable, "-c", TOKENS, address, home], cwd=project_root, capture_output=True, text=True, check=True
    )
    taken, wrong, missing, disabled = ended.stdout.splitlines()
    assert taken == "taken"
    assert "that it refuses the token of RAY_AUTH_TOKEN: put there what ray get-auth-token says" in wrong
    assert "a-wrong-token" not in ended.stdout + ended.stderr
    assert "no token here: put the cluster's in ~/.ray/auth_token" in missing
    assert "none is sent without RAY_AUTH_MODE=token" in disabled


def test_other_versions_and_a_machine_that_is_no_node(ray_cluster: None, monkeypatch: pytest.MonkeyPatch):
    import ray

    address = ray.get_runtime_context().gcs_address
    with monkeypatch.context() as patch:
        patch.setattr("ray._private.services.find_node_ids", set)
        assert "of whose 1 nodes none runs here: submit the job" in refusal(address)
    here = joining.versions_here()
    monkeypatch.setattr(joining, "versions_here", lambda: here._replace(ray="2.58.1", python="3.12.1"))
    assert f"expected {here} as the cluster has, found Ray 2.58.1 with Python 3.12.1 here" in refusal(address)


def test_an_embedded_ray_listens_to_this_machine_alone(ray_cluster: None):
    ports: dict[str, set[str]] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            found = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        for connection in found:
            if connection.status == psutil.CONN_LISTEN:
                ports.setdefault(connection.laddr.ip.removeprefix("::ffff:"), set()).add(process.name())
    assert any("raylet" in names for names in ports.values())
    assert set(ports) <= {"127.0.0.1", "::1"}, ports


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> None:
    """The cluster of the tests, as if another machine were in it."""
    monkeypatch.setattr(cluster, "machines", lambda: Machines(2, may_grow=False))


def stages(folder: Path, store: str, teacher: str, out: Path) -> dict[str, Any]:
    return {
        "teach": lambda: teach(teach_spec(out, workers=1)),
        "rollout": lambda: rollout(make_spec(out, teacher, actors=1)),
        "distill": lambda: distill(distill_spec(store, out, workers=1)),
        "sweep": lambda: sweep(SweepSpec(store=store, out=str(out), steps=(1,))),
        "evaluate": lambda: evaluate(EvaluateSpec(teacher=teacher, out=str(out), samples=50, actors=1)),
    }


@pytest.mark.parametrize("stage", ["teach", "rollout", "distill", "sweep", "evaluate"])
def test_a_path_of_one_machine_is_refused_on_two(
    stage: str, two_machines: None, small_store: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Until it is said that they share it; then a database that only one of them has is refused."""
    run = stages(tmp_path, small_store, teacher, tmp_path / "out")[stage]
    told = (
        r"--(out|store): expected s3:// or a folder that every machine sees, since the cluster has 2 machines, found /"
    )
    with pytest.raises(ArgumentError, match=told):
        run()
    assert not (tmp_path / "out").exists()
    if stage in {"teach", "distill", "sweep"}:
        monkeypatch.setenv(storage.SHARED_VARIABLE, f"/nowhere:{os.path.dirname(teacher)}:{small_store}:{tmp_path}/")
        with pytest.raises(DistillKacError, match="MLFLOW_TRACKING_URI: expected a tracking server, since the cluster"):
            run()


def test_work_in_this_process_may_use_its_own_disk(two_machines: None, teacher: str, tmp_path: Path):
    assert rollout(make_spec(tmp_path / "store", teacher, actors=0)) is not None


def test_a_worker_goes_by_what_its_driver_has_asked(two_machines: None):
    import ray

    @ray.remote(num_cpus=0)
    def ask() -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster, "machines", lambda: Machines(2, may_grow=False))
            storage.check_shared({"--out": "/local"}, lambda: True)
        return True

    with pytest.raises(ArgumentError, match="`out`: expected s3://"):
        storage.check_shared({"--out": "/local"}, lambda: True)
    assert ray.get(ask.remote())


def test_which_folders_are_shared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(storage.SHARED_VARIABLE, "/mnt/efs/:/home")
    for path in ("/mnt/efs", "/mnt/efs/a/b", "file:///home/me", "s3://bucket/a"):
        assert storage.is_shared(path)
    for path in ("/mnt/efs2/a", "/mnt/efs/../local", "/tmp/a"):
        assert not storage.is_shared(path)
    monkeypatch.setenv(storage.SHARED_VARIABLE, "efs")
    with pytest.raises(ArgumentError, match=f"{storage.SHARED_VARIABLE}: expected absolute folders"):
        storage.is_shared("/tmp/a")


def test_a_cluster_that_grows_is_several_machines(ray_cluster: None, monkeypatch: pytest.MonkeyPatch):
    assert cluster.machines() == Machines(1, may_grow=False)
    import ray

    nodes = [{**node, "Labels": {cluster.NODE_GROUP_LABEL: "head"}} for node in ray.nodes()]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert str(cluster.machines()) == "1 machine and an autoscaler"
    assert not cluster.machines().are_one


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_too_long_for_sockets_is_named(variable: str, tmp_path: Path, project_root: Path):
    """In a process of its own: this one may have a Ray already."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    words = ["--data", "moons", "--workers", "1", "--out", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name not in {"RAY_ADDRESS", "RAY_TMPDIR"}}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.teach", *words],
        cwd=project_root,
        env={**environment, variable: str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert f"error: {variable}: " in line and str(folder) in line and f"Set {variable} to a shorter folder" in line
    assert not (tmp_path / "out" / "config.json").exists()
