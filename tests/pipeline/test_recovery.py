"""When training on workers restarts, waits or stops. A fake trainer fails as Ray Train's trainers do."""

import contextlib
from pathlib import Path

import pytest
from ray.train import ControllerError, PreemptionError, PreemptionInfo, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from kac.util.errors import DistillKacError, StorageError
from kac.util.options import Range
from pipeline.cluster import placement, ray_internals
from pipeline.cluster.placement import Node, Resources
from pipeline.outputs import STATE_FILE, TRAINING_FOLDER
from pipeline.training import recovery

LOST = WorkerGroupError("worker 1 died", {1: WorkerHealthCheckFailedError("worker 1 died", RuntimeError("it died"))})
DRAINING = WorkerGroupError("a node is draining", {0: recovery.NodeDrainingError("a node is draining")})
UNREACHABLE = WorkerGroupError("1 of 2 failed", {0: RuntimeError("rank 1 does not answer")})
PREEMPTED = PreemptionError(PreemptionInfo(None, {"node": [1]}), drain_timed_out=True)
NO_START = ControllerError(WorkerGroupStartupFailedError("a worker died as it started"))
NO_RESOURCES = ControllerError(WorkerGroupStartupTimeoutError(2))


class Cluster:
    """A cluster of nodes with one CPU each. Its clock advances by each sleep's length and by a minute per attempt."""

    def __init__(self) -> None:
        self.alive, self.free, self.comes_back_at = 2, 2, 0.0
        self.now, self.asked_for = 0.0, 0
        self.groups: list[int | Range] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.comes_back_at and self.now >= self.comes_back_at:
            self.alive = self.free = 2

    def asking(self, wanted: int, resources: Resources) -> contextlib.AbstractContextManager[str]:
        self.asked_for = wanted
        return contextlib.nullcontext("request")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    fake = Cluster()
    monkeypatch.setattr(recovery, "time", fake)
    monkeypatch.setattr(placement, "requested_from_autoscaler", fake.asking)
    monkeypatch.setattr(ray_internals, "is_embedded", lambda: False)
    monkeypatch.setattr(placement, "live_nodes", lambda: [Node({"CPU": 1}, {})] * fake.alive)
    monkeypatch.setattr(placement, "free_resources", lambda: [Node({"CPU": 1}, {})] * fake.free)
    return fake


def fit(
    cluster: Cluster, out: Path, *attempts: tuple[Exception | str, bool], workers: int | Range = 2, left_alive: int = 2
) -> object:
    """Return the result of ``recovery.fit``.

    Args:
        attempts: the outcome of each attempt, and whether it saves a checkpoint.
        left_alive: nodes that are left after a failed attempt.
    """
    left = list(attempts)

    class Trainer:
        def __init__(self, group: int | Range) -> None:
            cluster.groups.append(group)

        def fit(self) -> object:
            outcome, saves = left.pop(0)
            cluster.now += 60
            if saves:
                folder = out / TRAINING_FOLDER / f"checkpoint_{len(left)}"
                folder.mkdir(parents=True)
                (folder / STATE_FILE).touch()
            if isinstance(outcome, Exception):
                cluster.alive = left_alive
                raise outcome
            return outcome

    result = recovery.fit(Trainer, "teach", str(out), workers, Resources(1.0))
    assert not left
    return result


def test_training_restarts_as_long_as_it_makes_progress(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = [(LOST, True)] * (2 * recovery.MAX_FAILURES)
    assert fit(cluster, tmp_path, *many, ("done", False)) == "done"
    assert "teach: lost the worker of rank 1; resuming" in capsys.readouterr().out


@pytest.mark.parametrize(("failure", "message"), [(LOST, "worker 1 died"), (NO_START, "a worker died as it started")])
def test_repeated_failures_without_progress_end_training(
    cluster: Cluster, tmp_path: Path, failure: Exception, message: str
) -> None:
    enough = [(failure, False)] * recovery.MAX_FAILURES
    assert fit(cluster, tmp_path / "a", *enough, (failure, True), *enough[1:], ("done", False)) == "done"
    with pytest.raises(DistillKacError, match=f"{message}$"):
        fit(cluster, tmp_path / "b", *enough, (failure, False))


def test_a_refusal_by_a_worker_ends_training_at_once(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = DistillKacError("Lower `optimizer.learning_rate`.")
    diverged = WorkerGroupError("2 of 2 failed", {0: refusal, 1: RuntimeError("rank 0 does not answer")})
    with pytest.raises(DistillKacError, match=r"Lower `optimizer.learning_rate`\.$"):
        fit(cluster, tmp_path, (diverged, True))
    assert len(cluster.groups) == 1
    assert capsys.readouterr() == ("", "")


def test_a_drained_node_is_not_reported_as_lost(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(cluster, tmp_path, (DRAINING, True), ("done", False), left_alive=2) == "done"
    assert capsys.readouterr().out == "teach: a node is draining; resuming from the last checkpoint\n"


@pytest.mark.parametrize("failure", [LOST, DRAINING, UNREACHABLE, PREEMPTED])
def test_a_range_waits_until_ray_has_noticed_that_a_node_is_lost(
    cluster: Cluster, tmp_path: Path, failure: Exception
) -> None:
    """Until then, Ray Train would start workers on the node, and wait for them forever."""
    assert fit(cluster, tmp_path, (failure, True), ("done", False), workers=Range(1, 2), left_alive=1) == "done"
    assert cluster.now == 2 * 60 + recovery.DETECTION_SECONDS


def test_a_failed_request_to_s3_is_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    failed = WorkerGroupError("1 of 1 failed", {0: StorageError("s3://bucket/out: a request to S3 failed.")})
    assert fit(cluster, tmp_path, (failed, True), ("done", False)) == "done"


@pytest.mark.parametrize("workers", [2, Range(2, 4)])
def test_the_wait_for_nodes_is_limited(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int | Range
) -> None:
    """The wait is also limited for a range of workers, for which Ray Train itself would wait silently and forever."""
    cluster.comes_back_at = 600.0
    assert fit(cluster, tmp_path, (LOST, True), ("done", False), workers=workers, left_alive=1) == "done"
    assert cluster.asked_for == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if "2 x (1 CPU)" in line]
    assert len(lines) == 1 and "20 minutes" in lines[0]
    cluster.comes_back_at = 0.0
    with pytest.raises(DistillKacError, match=r"2 x \(1 CPU\).*20 minutes.*`workers`"):
        fit(cluster, tmp_path / "other", (LOST, True), workers=workers, left_alive=1)


def test_an_embedded_ray_does_not_wait_for_nodes(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_internals, "is_embedded", lambda: True)
    cluster.alive = 1
    with pytest.raises(DistillKacError, match=r"2 x \(1 CPU\)"):
        fit(cluster, tmp_path)
    assert cluster.now == 0


def test_the_wait_for_other_jobs_is_unlimited(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.free = 1
    assert fit(cluster, tmp_path, *[(NO_RESOURCES, False)] * 60, ("done", False)) == "done"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 60
    assert all("other jobs" in line and "2 x (1 CPU)" in line for line in lines)


def test_an_embedded_ray_does_not_wait_for_other_jobs(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_internals, "is_embedded", lambda: True)
    cluster.free = 1
    with pytest.raises(DistillKacError, match="training failed: "):
        fit(cluster, tmp_path, *[(NO_RESOURCES, False)] * (recovery.MAX_FAILURES + 1))


def test_a_range_starts_with_the_workers_that_fit_alongside_other_jobs(cluster: Cluster, tmp_path: Path) -> None:
    cluster.alive, cluster.free = 8, 3
    attempts = (NO_RESOURCES, False), (LOST, True), ("done", False)
    assert fit(cluster, tmp_path, *attempts, workers=Range(2, 8), left_alive=8) == "done"
    assert cluster.groups == [Range(2, 8), Range(2, 3), Range(2, 8)]
