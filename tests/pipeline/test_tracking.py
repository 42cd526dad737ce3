"""Tracking: metrics are declared, each output has one run, and a failing server loses nothing."""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from kac.util.errors import DistillKacError
from pipeline import tracking
from pipeline.config import SampleSpec
from pipeline.tracking import delivery, process_tags, runs
from pipeline.tracking.delivery import Delivery, Journal, leftovers
from pipeline.tracking.entries import Entry, Sender, first_batch
from pipeline.tracking.killed_runs import CloseDeadSpec, close_dead
from pipeline.tracking.server import file_name_of, local_folder

SPEC = SampleSpec(model="m", out="o.png")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "START_SECONDS", 0.5)
    monkeypatch.setattr(runs, "NESTED_SECONDS", 0.5)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.05)


@pytest.fixture
def uri(tracking_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The session's database under a path that only this test uses, so that this test has its own delivery."""
    path = tracking_database.removeprefix("sqlite:///")
    folder = tmp_path / "tracked"
    folder.mkdir()
    link = folder / "mlflow.db"
    link.symlink_to(path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{link}")
    yield f"sqlite:///{link}"
    delivery.delivery_to(f"sqlite:///{link}").flush(5)


def start(out: Path, fingerprint: str = "f", **more: Any) -> Any:
    return tracking.start_run(**{"spec": SPEC, "fingerprint": fingerprint, "inputs": {}, "output": str(out), **more})


def stored(run: tracking.TrackedRun) -> Any:
    """Return the run as stored in MLflow."""
    assert delivery.delivery_to(run.tracking_uri).flush(10)
    sender = delivery.delivery_to(run.tracking_uri).sender
    return sender.connected()[0].get_run(sender.id_of(run.run_id))


def history(run: tracking.TrackedRun, name: str) -> list[tuple[int, float]]:
    sender = delivery.delivery_to(run.tracking_uri).sender
    points = sender.connected()[0].get_metric_history(sender.id_of(run.run_id), name)
    return sorted((point.step, point.value) for point in points)


class SwitchableServer:
    """A server that a test can switch off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_off = False
        self.failed_threads: set[str] = set()  # names of the threads in which a call failed
        send, create, connect = Sender.send, Sender.create, runs.connect

        def switchable(call: Any) -> Any:
            def switchable_call(*arguments: Any) -> Any:
                if self.is_off:
                    self.failed_threads.add(threading.current_thread().name)
                    raise ConnectionError("connection refused")
                return call(*arguments)

            return switchable_call

        monkeypatch.setattr(Sender, "send", switchable(send))
        monkeypatch.setattr(Sender, "create", switchable(create))
        monkeypatch.setattr(runs, "connect", switchable(connect))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> SwitchableServer:
    return SwitchableServer(monkeypatch)


@pytest.mark.parametrize("name", ["speed", "losses/endpoint", "Loss", "steps_4/speed"])
def test_undeclared_metrics_are_refused(name: str):
    with pytest.raises(KeyError, match=name):
        tracking.TrackedRun("sqlite://", "none").metrics({name: 1.0})


def test_loss_parts_system_metrics_and_prefixed_names_are_logged(uri: str, tmp_path: Path):
    importlib.import_module("pipeline.evaluate.evaluate_stage")
    importlib.import_module("pipeline.training")
    values = {"loss": 3.0, "loss/endpoint": 1.0, "system/free": 2.0, "steps_4/guidance_1/frechet_distance_pixels": 0.5}
    with start(tmp_path) as run:
        run.metrics(values)
    assert stored(run).data.metrics == values


def test_the_metrics_of_every_stage_are_declared():
    importlib.import_module("pipeline.training")
    importlib.import_module("pipeline.rollout")
    importlib.import_module("pipeline.evaluate.evaluate_stage")
    assert {
        "frechet_distance_pixels",
        "label_agreement",
        "loss",
        "learning_rate",
        "samples_per_second",
        "trajectories",
    } <= set(tracking.METRICS)
    assert all(name == metric.name and metric.meaning for name, metric in tracking.METRICS.items())


def test_a_rerun_resumes_its_run(uri: str, tmp_path: Path):
    importlib.import_module("pipeline.training")
    with pytest.raises(RuntimeError), start(tmp_path) as first:
        first.metrics({"loss": 2.0}, step=50)
        raise RuntimeError("the disk is full")
    assert stored(first).info.status == "FAILED"
    with start(tmp_path, spec=SampleSpec(model="other", out="o.png")) as second:
        assert second == first == tracking.run_of_output(str(tmp_path))
        assert stored(second).info.status == "RUNNING"
        assert second.last_step("loss") == 50
        assert second.last_step("learning_rate") == 0
        second.metrics({"loss": 1.0}, step=100)
    found = stored(second)
    assert found.info.status == "FINISHED"
    assert found.data.params["model"] == "m"
    assert found.data.tags["distillkac.rerun.model"] == "other"
    assert "distillkac.rerun.out" not in found.data.tags
    assert history(second, "loss") == [(50, 2.0), (100, 1.0)]
    assert tracking.find_runs("f", SPEC.stage)[0] == second


def test_a_new_fingerprint_starts_a_new_run_and_a_lost_run_is_linked(uri: str, tmp_path: Path):
    with start(tmp_path) as first:
        pass
    with start(tmp_path, "g") as other:
        pass
    assert "distillkac.continues" not in stored(other).data.tags
    record = json.loads((tmp_path / "run.json").read_text())
    assert record == {"tracking_uri": uri, "run_id": other.run_id, "fingerprint": "g"} != first.run_id
    delivery.delivery_to(uri).sender.connected()[0].delete_run(other.run_id)
    with start(tmp_path, "g") as second:
        pass
    assert stored(second).data.tags["distillkac.continues"] == other.run_id
    (tmp_path / "run.json").write_text(json.dumps({**record, "tracking_uri": "http://lost:5000", "run_id": "old"}))
    assert tracking.run_of_output(str(tmp_path)) is None
    with start(tmp_path, "g") as third:
        pass
    assert stored(third).data.tags["distillkac.continues"] == "old"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_a_stopped_run_is_marked_as_killed(stop: BaseException, uri: str, tmp_path: Path):
    with pytest.raises(type(stop)), start(tmp_path) as run:
        raise stop
    assert stored(run).info.status == "KILLED"


def test_a_run_has_its_command_commit_and_data(uri: str, tmp_path: Path):
    data = tracking.LoggedDataset("moons", "0123456789abcdef" * 4, "/data/moons")
    with start(tmp_path, datasets=[data]) as run, start(tmp_path, datasets=[data]):
        pass
    found = stored(run)
    assert found.data.tags["mlflow.source.name"] == "python -m jobs.sample"
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert found.data.tags.get("mlflow.source.git.commit", "") == head
    (dataset_input,) = found.inputs.dataset_inputs
    assert (dataset_input.dataset.name, dataset_input.dataset.digest) == ("moons", "0123456789abcdef")
    assert [(tag.key, tag.value) for tag in dataset_input.tags] == [("mlflow.data.context", "training")]


def test_system_metrics_are_logged_and_continue_in_a_rerun(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    name = "system/cpu_utilization_percentage"
    for most in (1, 3):
        with start(tmp_path) as run:
            deadline = time.monotonic() + 20
            while run.last_step(name) < most and time.monotonic() < deadline:
                time.sleep(0.1)
    steps = [step for step, _ in history(run, name)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 3


DYING = """
import os, sys
import pipeline.training
from pipeline import tracking
from pipeline.config import SampleSpec
from pipeline.tracking.entries import Sender

def start(name, parent=None):
    spec = SampleSpec(model="m", out="o.png")
    return tracking.start_run(spec=spec, fingerprint=name, inputs={}, output=f"{sys.argv[1]}/{name}", parent=parent)

def refuse(*_):
    raise ConnectionError("refused")

for name in "abc":
    if os.fork() == 0:
        with start(name) as run, start(f"in-{name}", run) as inner:
            inner.flush()
            run.flush()
            Sender.send = refuse
            for step in range(1, 51):
                run.metrics({"loss": 1 / step}, step=step)
            print(run.run_id, inner.run_id, flush=True)
            os.kill(os.getpid(), 9)
    assert os.WTERMSIG(os.wait()[1]) == 9
"""


def test_killed_processes_lose_no_entry_and_their_runs_are_closed(uri: str, tmp_path: Path, project_root: Path):
    importlib.import_module("pipeline.training")
    command = [sys.executable, "-c", DYING, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=project_root)
    assert ended.returncode == 0, ended.stderr
    (outer, inner), (dead, dead_inner), (other, other_inner) = map(str.split, ended.stdout.splitlines())
    client, _ = tracking.connect(uri)
    client.set_tag(other, process_tags.HOST_TAG, "elsewhere")
    client.set_tag(other_inner, process_tags.HOST_TAG, "elsewhere")
    with start(tmp_path / "a", "a") as run:
        assert run.run_id == outer
        assert client.get_run(inner).info.status == "KILLED", "no process runs it"
        for run_id in (outer, dead, other):
            assert history(tracking.TrackedRun(uri, run_id), "loss") == [(n, 1 / n) for n in range(1, 51)]
        assert {dead, dead_inner} <= set(close_dead(CloseDeadSpec()))
        assert {client.get_run(run_id).info.status for run_id in (dead, dead_inner)} == {"KILLED"}
        assert {stored(run).info.status, client.get_run(other).info.status} == {"RUNNING"}
    assert close_dead(CloseDeadSpec(older_than=1.0)) == []
    assert set(close_dead(CloseDeadSpec(older_than=1e-9))) == {other, other_inner}
    assert client.get_run(other).info.status == "KILLED"


def test_a_server_that_goes_away_loses_nothing(
    uri: str, server: SwitchableServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    importlib.import_module("pipeline.training")
    with start(tmp_path) as run:
        for step in range(1, 301):
            server.is_off = 100 <= step < 200
            run.metrics({"loss": 1 / step}, step=step)
            if step == 150:
                run.artifact("a/b.txt", b"text")
                run.tags({"seen": "yes"})
                time.sleep(0.3)
    assert server.failed_threads == {"tracking"}, "only the delivery thread waits for the server"
    found = stored(run)
    assert history(run, "loss") == [(step, 1 / step) for step in range(1, 301)]
    assert (found.info.status, found.data.tags["seen"]) == ("FINISHED", "yes")
    client, _ = tracking.connect(uri)
    assert [file.path for file in client.list_artifacts(run.run_id, "a")] == ["a/b.txt"]
    assert capsys.readouterr().err.count("does not answer") == 1
    sizes = {path.stat().st_size for path in local_folder().glob(f"{file_name_of(uri)}-*.jsonl")}
    assert sizes == {0}, "no entry waits"


def test_a_full_disk_loses_nothing_while_the_process_lives(
    uri: str, server: SwitchableServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    importlib.import_module("pipeline.training")
    with start(tmp_path) as run:
        monkeypatch.setattr(os, "pwrite", failing_write([step % 7 == 1 for step in range(1, 301)]))
        for step in range(1, 301):
            server.is_off = 20 <= step < 280
            run.metrics({"loss": 1 / step}, step=step)
            if step % 40 == 0:
                time.sleep(0.1)
        server.is_off = False
    assert stored(run).info.status == "FINISHED"
    assert sorted(history(run, "loss")) == [(step, 1 / step) for step in range(1, 301)]


def failing_write(failures: list[bool]) -> Any:
    """Return a replacement for ``os.pwrite`` that stores only half of the data in the calls that should fail."""
    pwrite, calls = os.pwrite, iter(failures)

    def write(file: int, data: bytes, position: int) -> int:
        return pwrite(file, data[: len(data) // 2] if next(calls, False) else data, position)

    return write


def test_a_server_that_is_off_at_the_start_gets_the_run_later(
    uri: str, server: SwitchableServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    importlib.import_module("pipeline.training")
    server.is_off = True
    with start(tmp_path) as run, start(tmp_path / "in", "late", parent=run) as inner:
        inner.metrics({"loss": 1.0}, step=1)
        inner.image("samples", PNG, step=1)
    assert run.run_id.startswith("local-")
    server.is_off = False
    found = stored(inner)
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.parentRunId"] == stored(run).info.run_id
    assert found.data.tags["mlflow.loggedImages"] == "True"
    client, _ = tracking.connect(uri)
    pictures = [file.path for file in client.list_artifacts(found.info.run_id, "images")]
    assert len(pictures) == 2 and all(path.startswith("images/samples+step+1+timestamp+") for path in pictures)
    with start(tmp_path) as again:
        assert stored(again).info.run_id == stored(run).info.run_id
    assert len(tracking.find_runs("late")) == 1


def test_the_next_run_delivers_the_entries_of_a_killed_process(uri: str, server: SwitchableServer, tmp_path: Path):
    """Entries that are delivered twice are stored only once."""
    importlib.import_module("pipeline.training")
    with start(tmp_path) as run:
        run.metrics({"loss": 0.0}, step=1)
    stored(run)
    lost = Journal(uri)
    lost.append(Entry(run.run_id, "metrics", {"loss": float(step)}, time=step, step=step) for step in range(2, 2002))
    assert lost.path is not None
    with start(tmp_path / "other", "other"):
        pass
    assert len(history(run, "loss")) == 1, "the process of the other entries is alive"
    lost.close()
    data = lost.path.read_bytes() + b'{"run_id": "cut o'
    lost.path.write_bytes(data)
    assert delivery.sync() == 2000
    assert not lost.path.exists()
    lost.path.write_bytes(data)
    with start(tmp_path / "other", "other"):
        pass
    assert history(run, "loss") == [(1, 0.0), *((step, float(step)) for step in range(2, 2002))]
    assert not lost.path.exists()


def numbered(*steps: int) -> list[Entry]:
    return [Entry("run", "tags", {"a": "b"}, step=step) for step in steps]


def test_only_undelivered_entries_are_left_over(tmp_path: Path):
    """A second delivery of an old status would replace a newer one."""
    uri = f"sqlite:///{tmp_path}/a.db"
    journal = Journal(uri)
    journal.append(numbered(1, 2, 3, 4))
    journal.drop(2)
    assert list(leftovers(uri)) == [], "its process is alive"
    journal.close()
    for left, entries in leftovers(uri):
        assert [entry.step for entry in entries] == [3, 4]
        left.drop(1)
    for left, entries in leftovers(uri):
        assert [entry.step for entry in entries] == [4]
        left.clear()
        left.close()
    assert list(leftovers(uri)) == []


def test_a_delivery_that_stops_midway_does_not_repeat_what_it_delivered(
    uri: str, server: SwitchableServer, monkeypatch: pytest.MonkeyPatch
):
    left = Journal(uri)
    left.append(numbered(1))
    left.append([Entry("run", "status", {"status": "RUNNING"}), *numbered(2)])
    left.close()
    sent, failures = [], iter([False, True])

    def send(batch: list[Entry]) -> None:
        if next(failures, False):
            raise ConnectionError("no server")
        sent.extend(entry.kind for entry in batch)

    later = Delivery(uri)
    monkeypatch.setattr(later, "_send", send)
    assert later.deliver_leftovers() == (1, True)
    assert later.deliver_leftovers() == (2, False)
    assert sent == ["tags", "status", "tags"]


def test_entries_keep_their_order_while_the_disk_fails_and_recovers(
    uri: str, server: SwitchableServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A killed process leaves all entries, in order, if the disk accepted the last one."""
    waiting = Delivery(uri)
    monkeypatch.setattr(waiting, "_send", unreachable)
    for step in (1, 2, 3, 4):
        with monkeypatch.context() as patch:
            if step in (2, 3):
                patch.setattr(os, "pwrite", failing_write([True]))
            waiting.put(*numbered(step))
    waiting.close()
    waiting.put(*numbered(5))
    journal = waiting._journal
    assert journal.path is not None
    with journal.path.open("rb") as file:
        assert [entry.step for entry in Journal(uri).read(journal.path, file)] == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("cannot store") == 1
    journal.path.unlink()


def test_a_full_disk_at_the_end_loses_no_stored_entry(
    uri: str, server: SwitchableServer, monkeypatch: pytest.MonkeyPatch
):
    waiting = Delivery(uri)
    monkeypatch.setattr(waiting, "_send", unreachable)
    waiting.put(*numbered(1, 2))
    monkeypatch.setattr(os, "pwrite", failing_write([True] * 3))
    waiting.put(*numbered(3))
    waiting.close()
    path = waiting._journal.path
    assert path is not None
    with path.open("rb") as file:
        assert [entry.step for entry in Journal(uri).read(path, file)] == [1, 2]
    path.unlink()


def unreachable(batch: object) -> None:
    raise ConnectionError("no server")


def test_a_journal_overwrites_entries_that_a_full_disk_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = f"sqlite:///{tmp_path}/a.db"
    journal, entries = Journal(uri), [Entry("run", "tags", {"a": "x" * 100}, step=step) for step in range(4)]
    monkeypatch.setattr(os, "pwrite", failing_write([False, True, False]))
    journal.append(entries[:2])
    with pytest.raises(OSError, match="space"):
        journal.append(entries[2:])
    journal.append(entries[3:])
    assert list(leftovers(uri)) == [], "its process is alive"
    journal.close()
    ((journal, left),) = leftovers(uri)
    assert left == [*entries[:2], entries[3]]
    assert journal.path is not None
    journal.path.unlink()


def test_a_file_that_the_server_cannot_store_does_not_block_other_entries(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    send = Sender.send

    def send_no_files(self: Sender, batch: list[Entry]) -> None:
        if batch[0].kind == "file":
            raise PermissionError("no access to the bucket")
        send(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Sender, "send", send_no_files)
        with start(tmp_path) as run:
            run.artifact("a.txt", b"text")
        assert stored(run).info.status == "FINISHED"
    assert delivery.sync() == 1
    assert [file.path for file in MlflowClient(uri).list_artifacts(run.run_id)] == ["a.txt"]


def test_refused_entries_do_not_block_later_ones(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with start(tmp_path) as run:
        run.tags({"good": "1", "bad name: \n?": "2"})
        run.tags({"better": "3"})
    tags = stored(run).data.tags
    assert (tags["good"], tags["better"]) == ("1", "3")
    assert capsys.readouterr().err.count("refuses tags bad name") == 1


def test_an_unusable_tracking_uri_is_refused_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://me:secret@host")
    with (
        pytest.raises(DistillKacError, match="MLFLOW_TRACKING_URI=nonsense://host") as refused,
        start(tmp_path),
    ):
        pass
    assert "secret" not in str(refused.value)


@pytest.fixture
def experiment(uri: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of an experiment of this test, in which new runs are created."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    return tracking.connect(uri)[1]


def test_runs_are_created_in_the_experiment_of_the_environment(uri: str, experiment: str, tmp_path: Path):
    with start(tmp_path, "of another experiment") as run:
        pass
    assert stored(run).info.experiment_id == experiment
    assert MlflowClient(uri).get_experiment(experiment).name == "another"
    assert tracking.find_runs("of another experiment") == [run]


def test_a_deleted_experiment_is_refused_before_the_work(
    uri: str, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    client = MlflowClient(uri)
    with start(tmp_path) as run:
        pass
    client.delete_experiment(experiment)
    with pytest.raises(DistillKacError, match=f"restore --experiment-id {experiment}") as refused, start(tmp_path):
        pytest.fail("the work has started")
    assert "MLFLOW_EXPERIMENT_NAME" in str(refused.value) and "\n" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "a third")
    with start(tmp_path) as elsewhere:
        pass
    assert stored(elsewhere).data.tags[runs.CONTINUES_TAG] == run.run_id
    client.restore_experiment(experiment)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    with start(tmp_path / "restored") as again:
        pass
    assert stored(again).info.experiment_id == experiment
    client.delete_experiment(experiment)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_access_is_reported_at_once(status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>\nno\n</html>")

        def log_message(self, format: str, *arguments: Any) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(DistillKacError, match=address) as refused, start(tmp_path):
            pytest.fail("the work has started")
        server.shutdown()
    assert str(status) in str(refused.value) and "\n" not in str(refused.value)


def test_a_long_parameter_is_cut(uri: str, tmp_path: Path):
    with start(tmp_path) as run:
        run.params({"whole": "a" * 500, "shortened": "b" * 501})
    params = stored(run).data.params
    assert params["whole"] == "a" * 500
    assert params["shortened"] == "b" * 499 + "…"


def test_a_batch_fits_into_one_request():
    def entries(kind: Any, count: int, run_id: str = "r") -> list[Entry]:
        return [Entry(run_id, kind, {str(number): "1"}) for number in range(count)]

    assert len(first_batch(entries("metrics", 1500))) == 1000
    assert len(first_batch(entries("tags", 60) + entries("tags", 60))) == 100
    assert len(first_batch(entries("metrics", 5) + entries("tags", 5))) == 5
    assert len(first_batch(entries("metrics", 5) + entries("metrics", 5, "s"))) == 5
    assert len(first_batch(entries("file", 2))) == 1


START_TOGETHER = """
import os, sys
from pathlib import Path
from pipeline import tracking
from pipeline.config import SampleSpec

name = "child" if os.fork() == 0 else "parent"
Path(sys.argv[1], f"ready-{name}").touch()
while len(list(Path(sys.argv[1]).glob("ready-*"))) < 2:
    pass
out = f"{sys.argv[1]}/{name}"
with tracking.start_run(spec=SampleSpec(model="m", out="o"), fingerprint="f", inputs={}, output=out):
    pass
if name == "parent":
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_two_processes_can_create_the_same_database(tmp_path: Path, project_root: Path):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    command = [sys.executable, "-c", START_TOGETHER, str(tmp_path)]
    subprocess.run(command, env=environment, cwd=project_root, check=True)
    assert len(tracking.find_runs("f", uri=environment["MLFLOW_TRACKING_URI"])) == 2


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001"
    "f61738550000000049454e44ae426082"
)
