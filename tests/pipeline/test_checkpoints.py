"""When checkpoints are due: by updates or by time, at a bounded cost, and after the same update on all workers."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest
import ray.train
import torch

from pipeline.outputs import STATE_FILE, TRAINING_FOLDER
from pipeline.training.hosts import _RayTrain
from pipeline.training.loop import CheckpointSchedule

CPU = torch.device("cpu")


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def saved_at(
    total: int, updates: int, seconds: float, update_seconds: float, saving: float, first: int = 0
) -> list[tuple[int, float]]:
    """Return the updates after which a run saves, each with the seconds since the previous checkpoint."""
    clock = Clock()
    checkpoints = CheckpointSchedule(updates, seconds, CPU, first, clock)
    checkpointed, before = [], clock.now
    for done in range(first + 1, total + 1):
        clock.now += update_seconds
        if checkpoints.is_due(done):
            checkpointed.append((done, clock.now - before))
            began = clock.now
            clock.now += saving
            checkpoints.saved(began)
            before = clock.now
    return checkpointed


def test_fast_updates_are_saved_by_number():
    assert [done for done, _ in saved_at(2000, 500, 600, update_seconds=0.01, saving=0.1)] == [500, 1000, 1500, 2000]
    assert [done for done, _ in saved_at(2000, 500, 600, 0.01, 0.1, first=1100)] == [1500, 2000]


@pytest.mark.parametrize("update_seconds", [0.9, 7.0, 45.0, 700.0])
def test_slow_updates_are_saved_by_time(update_seconds: float):
    """Each checkpoint, including the first, is at most two updates late."""
    found = saved_at(int(6000 / update_seconds) + 2, 10**9, 600, update_seconds, saving=0.5)
    assert len(found) >= 2
    assert all(600 - update_seconds <= since < 600 + 2 * update_seconds for _, since in found)


@pytest.mark.parametrize(("updates", "seconds"), [(500, 600), (1, 1e9), (10**9, 1)])
def test_saving_takes_at_most_a_twentieth_of_the_time(updates: int, seconds: float):
    saving = 40.0
    found = saved_at(20_000, updates, seconds, update_seconds=0.3, saving=saving)
    assert len(found) > 3
    assert all(saving / (saving + since) <= 0.05 for _, since in found[1:])


def test_fast_saving_is_not_limited():
    assert len(saved_at(100, 1, 600, update_seconds=0.001, saving=0.02)) == 100


def test_updates_that_become_slow_are_noticed():
    clock = Clock()
    checkpoints = CheckpointSchedule(10**9, 600, CPU, 0, clock)
    due = []
    for done in range(1, 400):
        clock.now += 0.1 if done <= 210 else 20
        if checkpoints.is_due(done):
            due.append(done)
            checkpoints.saved(clock.now)
    assert due[0] == 239, "600 seconds have passed"


def test_a_checkpoint_that_must_be_saved_is_due_at_the_next_decision():
    clock, asked = Clock(), []

    def must_save() -> bool:
        asked.append(clock.now)
        return len(asked) == 10

    checkpoints = CheckpointSchedule(10**9, 600, CPU, 0, clock, must_save)
    due = []
    for done in range(1, 200):
        clock.now += 0.1
        if checkpoints.is_due(done):
            due.append(done)
            checkpoints.saved(clock.now)
    assert len(due) == 1
    assert 15 < len(asked) < 25, "about once per second"


def test_all_workers_save_after_the_update_that_rank_0_chooses(monkeypatch: pytest.MonkeyPatch):
    """The workers' clocks differ. The test also checks that every broadcast is received, with its type."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    clocks = [Clock(), Clock()]
    first, second = (CheckpointSchedule(10**9, 600, CPU, 0, clock) for clock in clocks)

    def broadcast(values: torch.Tensor, src: int) -> None:
        if asking is first:
            sent.append(values)
        else:
            assert values.dtype == sent[0].dtype
            values.copy_(sent.pop())

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    saved = 0
    for done in range(1, 1000):
        clocks[0].now += 10.0
        clocks[1].now += 0.3
        due = []
        for asking in (first, second):
            due.append(asking.is_due(done))
        assert due[0] == due[1]
        assert not sent
        if due[0]:
            saved += 1
            first.saved(clocks[0].now)
            second.saved(clocks[1].now - 100)
    assert saved == 16


@pytest.mark.parametrize("fails", [False, True])
def test_a_checkpoint_waits_until_the_previous_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A failed write does not block the next checkpoint. Ray Train ends training after the failure."""
    folder, reports = tmp_path / TRAINING_FOLDER, list[dict[str, Any]]()
    storage = SimpleNamespace(experiment_fs_path=str(folder), storage_filesystem=pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
    monkeypatch.setattr(ray.train, "report", lambda metrics, **options: reports.append(options))
    host = _RayTrain(str(tmp_path), is_main=True)
    host.report({"update": 1.0}, b"first")
    host.report({"update": 2.0}, None)  # a validation does not wait
    second = threading.Thread(target=host.report, args=({"update": 3.0}, b"second"))
    second.start()
    second.join(0.5)
    assert len(reports) == 2
    if fails:
        folder.write_text("a file, so that no folder can be made here")
        with pytest.raises(OSError):
            reports[0]["checkpoint_upload_fn"](reports[0]["checkpoint"], "one")
    else:
        written = reports[0]["checkpoint_upload_fn"](reports[0]["checkpoint"], "one")
        assert (Path(written.path) / STATE_FILE).read_bytes() == b"first"
    second.join(30)
    assert len(reports) == 3
