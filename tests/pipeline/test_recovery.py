"""When a training on workers is tried again, when it waits, and when it ends: a trainer fails as Ray Train's do."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from kac.errors import DistillKacError
from pipeline.outputs import STATE_FILE, TRAINING_FOLDER
from pipeline.training import recovery

LOST = WorkerGroupError("worker 1 died", {1: RuntimeError("worker 1 died")})
NO_START = ControllerError(WorkerGroupStartupFailedError("a worker died as it started"))
NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))


def fit(out: Path, *attempts: tuple[Exception | str, bool], passes: Callable[[], None] = lambda: None) -> object:
    """The result of attempts that each leave a checkpoint or none; ``passes`` is called at each."""
    left = list(attempts)

    class Trainer:
        def fit(self) -> object:
            outcome, is_ahead = left.pop(0)
            passes()
            if is_ahead:
                folder = out / TRAINING_FOLDER / f"checkpoint_{len(left)}"
                folder.mkdir(parents=True)
                (folder / STATE_FILE).touch()
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

    result = recovery.fit(Trainer, "teach", str(out), "2 workers with a CPU each")
    assert not left
    return result


def test_it_goes_on_as_long_as_it_gets_ahead(tmp_path: Path) -> None:
    many = [(LOST, True)] * (2 * recovery.MAX_FAILURES)
    assert fit(tmp_path, *many, ("done", False)) == "done"


def test_a_group_that_fails_where_it_failed_before_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DistillKacError, match=r"training failed: worker 1 died$"):
        fit(tmp_path, (LOST, True), (LOST, False))
    with pytest.raises(DistillKacError, match=r"a worker died as it started$"):
        fit(tmp_path, *[(NO_START, False)] * (recovery.MAX_FAILURES + 1))


def test_room_is_waited_for_and_not_for_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(recovery, "now", lambda: now[0])

    def minute() -> None:
        now[0] += 60.0

    a_while = [(NO_ROOM, False)] * 20
    assert fit(tmp_path, (LOST, True), *a_while, (LOST, True), *a_while, ("done", False), passes=minute) == "done"
    said = capsys.readouterr().out
    assert "teach: no room for 2 workers with a CPU each: waiting for nodes, for 20 minutes at most" in said
    with pytest.raises(DistillKacError, match=r"expected room for 2 workers .* found too little for 20 minutes: "):
        fit(tmp_path / "other", *[(NO_ROOM, False)] * 21, passes=minute)
