"""When a training on workers is tried again, when it waits, and when it ends: a trainer fails as Ray Train's do."""

import contextlib
from pathlib import Path

import pytest
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)

from kac.util.errors import DistillKacError
from kac.util.options import Range
from pipeline.cluster import placement
from pipeline.cluster.placement import Node, Share
from pipeline.outputs import STATE_FILE, TRAINING_FOLDER
from pipeline.training import recovery

LOST = WorkerGroupError("worker 1 died", {1: RuntimeError("worker 1 died")})
NO_START = ControllerError(WorkerGroupStartupFailedError("a worker died as it started"))
NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))


class Cluster:
    """Of nodes with a CPU each; time goes on by what is slept and by a minute an attempt."""

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

    def asking(self, wanted: int, share: Share) -> contextlib.AbstractContextManager[str]:
        self.asked_for = wanted
        return contextlib.nullcontext("request")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(recovery, "time", made)
    monkeypatch.setattr(placement, "asking", made.asking)
    monkeypatch.setattr(placement, "is_embedded", lambda: False)
    monkeypatch.setattr(placement, "alive", lambda: [Node({"CPU": 1}, {})] * made.alive)
    monkeypatch.setattr(placement, "free", lambda: [Node({"CPU": 1}, {})] * made.free)
    return made


def fit(
    cluster: Cluster, out: Path, *attempts: tuple[Exception | str, bool], workers: int | Range = 2, left_alive: int = 2
) -> object:
    """The result of attempts that each leave a checkpoint or none; one that fails leaves so many nodes."""
    left = list(attempts)

    class Trainer:
        def __init__(self, group: int | Range) -> None:
            cluster.groups.append(group)

        def fit(self) -> object:
            outcome, is_ahead = left.pop(0)
            cluster.now += 60
            if is_ahead:
                folder = out / TRAINING_FOLDER / f"checkpoint_{len(left)}"
                folder.mkdir(parents=True)
                (folder / STATE_FILE).touch()
            if isinstance(outcome, Exception):
                cluster.alive = left_alive
                raise outcome
            return outcome

    result = recovery.fit(Trainer, "teach", str(out), workers, Share(1.0))
    assert not left
    return result


def test_it_goes_on_as_long_as_it_gets_ahead(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = [(LOST, True)] * (2 * recovery.MAX_FAILURES)
    assert fit(cluster, tmp_path, *many, ("done", False)) == "done"
    assert "teach: lost the worker of rank 1: going on from the last checkpoint\n" in capsys.readouterr().out


@pytest.mark.parametrize(("failure", "told"), [(LOST, "worker 1 died"), (NO_START, "a worker died as it started")])
def test_a_group_that_fails_where_it_failed_before_is_an_error(
    cluster: Cluster, tmp_path: Path, failure: Exception, told: str
) -> None:
    enough = [(failure, False)] * recovery.MAX_FAILURES
    assert fit(cluster, tmp_path / "a", *enough, (failure, True), *enough[1:], ("done", False)) == "done"
    with pytest.raises(DistillKacError, match=rf"training failed: {told}$"):
        fit(cluster, tmp_path / "b", *enough, (failure, False))


def test_what_a_worker_tells_people_is_told_at_once(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = UserExceptionWithTraceback(DistillKacError("lower `optimizer.learning_rate`"), "a traceback")
    diverged = WorkerGroupError("2 of 2 failed", {0: told, 1: RuntimeError("rank 0 does not answer")})
    with pytest.raises(DistillKacError, match=r"training failed: lower `optimizer.learning_rate`$"):
        fit(cluster, tmp_path, (diverged, True))
    assert len(cluster.groups) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("workers", [2, Range(2, 4)])
def test_nodes_are_waited_for_and_not_for_ever(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int | Range
) -> None:
    """Of a range, too: Ray Train itself would wait without a word."""
    cluster.comes_back_at = 600.0
    assert fit(cluster, tmp_path, (LOST, True), ("done", False), workers=workers, left_alive=1) == "done"
    assert cluster.asked_for == 2
    said = capsys.readouterr().out
    assert "teach: no room for 2 x (1 CPU): waiting for nodes, for 20 minutes at most\n" in said
    assert said.count("no room") == 9, "a line a minute"
    cluster.comes_back_at = 0.0
    with pytest.raises(DistillKacError, match=r"expected room for 2 x \(1 CPU\), found too little for 20 minutes: "):
        fit(cluster, tmp_path / "other", (LOST, True), workers=workers, left_alive=1)


def test_one_machine_gets_no_other_nodes(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "is_embedded", lambda: True)
    cluster.alive = 1
    with pytest.raises(DistillKacError, match=r"expected room for 2 x \(1 CPU\), found too little"):
        fit(cluster, tmp_path)
    assert cluster.now == 0


def test_other_work_is_waited_for_as_long_as_it_takes(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.free = 1
    assert fit(cluster, tmp_path, *[(NO_ROOM, False)] * 60, ("done", False)) == "done"
    said = "teach: waits until other work on the cluster leaves room for 2 x (1 CPU)\n"
    assert capsys.readouterr().out == said * 60


def test_a_ray_of_ones_own_has_no_other_work_to_wait_for(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "is_embedded", lambda: True)
    cluster.free = 1
    with pytest.raises(DistillKacError, match="training failed: "):
        fit(cluster, tmp_path, *[(NO_ROOM, False)] * (recovery.MAX_FAILURES + 1))


def test_a_range_begins_with_what_other_work_leaves(cluster: Cluster, tmp_path: Path) -> None:
    cluster.alive, cluster.free = 8, 3
    attempts = (NO_ROOM, False), (LOST, True), ("done", False)
    assert fit(cluster, tmp_path, *attempts, workers=Range(2, 8), left_alive=8) == "done"
    assert cluster.groups == [Range(2, 8), Range(2, 3), Range(2, 8)]
