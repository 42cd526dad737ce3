"""Tracking: one table of metrics, one run a thing, and a server that fails costs nothing."""

import importlib
import json
import os
import signal
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
from pipeline.config.specs import SampleSpec
from pipeline.tracking import delivery, processes, runs, spill
from pipeline.tracking.entries import Entry, first_batch
from pipeline.tracking.sender import Sender
from pipeline.tracking.server import local_folder

SPEC = SampleSpec(model="m", out="o.png")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "START_SECONDS", 0.5)
    monkeypatch.setattr(runs, "NESTED_SECONDS", 0.5)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.05)


@pytest.fixture
def uri(tracking_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The session's database under a name of this test's own, so that its deliveries are too."""
    path = tracking_database.removeprefix("sqlite:///")
    folder = tmp_path / "tracked"
    folder.mkdir()
    own = folder / "mlflow.db"
    own.symlink_to(path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{own}")
    yield f"sqlite:///{own}"
    tracking.runs.delivery_to(f"sqlite:///{own}").flush(5)


def started(out: Path, fingerprint: str = "f", **more: Any) -> Any:
    return tracking.start_run(**{"spec": SPEC, "fingerprint": fingerprint, "inputs": {}, "output": str(out), **more})


def known(run: tracking.TrackedRun) -> Any:
    """What MLflow knows of the run."""
    assert delivery.delivery_to(run.tracking_uri).flush(10)
    sender = delivery.delivery_to(run.tracking_uri).sender
    return sender.connected()[0].get_run(sender.id_of(run.run_id))


def history(run: tracking.TrackedRun, name: str) -> list[tuple[int, float]]:
    sender = delivery.delivery_to(run.tracking_uri).sender
    found = sender.connected()[0].get_metric_history(sender.id_of(run.run_id), name)
    return sorted((point.step, point.value) for point in found)


class Away:
    """A server that can be switched off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_away = False
        self.asked_in_vain: set[str] = set()  # by which threads
        send, create, connect = Sender.send, Sender.create, delivery.connect

        def refuse() -> None:
            if self.is_away:
                self.asked_in_vain.add(threading.current_thread().name)
                raise ConnectionError("nobody listens")

        def guarded(call: Any) -> Any:
            def guarded_call(*arguments: Any) -> Any:
                refuse()
                return call(*arguments)

            return guarded_call

        monkeypatch.setattr(Sender, "send", guarded(send))
        monkeypatch.setattr(Sender, "create", guarded(create))
        monkeypatch.setattr(delivery, "connect", guarded(connect))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Away:
    return Away(monkeypatch)


@pytest.mark.parametrize("name", ["speed", "losses/endpoint", "Loss", "steps_4/speed"])
def test_other_metrics_than_those_of_the_table_are_refused(name: str):
    with pytest.raises(KeyError, match=name):
        tracking.TrackedRun("sqlite://", "none").metrics({name: 1.0})


def test_parts_of_the_loss_and_names_with_prefixes_are_logged(uri: str, tmp_path: Path):
    importlib.import_module("pipeline.evaluate.stage")
    importlib.import_module("pipeline.training")
    values = {"loss": 3.0, "loss/endpoint": 1.0, "system/free": 2.0, "steps_4/guidance_1/frechet_distance_pixels": 0.5}
    with started(tmp_path) as run:
        run.metrics(values)
    assert known(run).data.metrics == values


def test_every_stages_metrics_are_in_the_table():
    importlib.import_module("pipeline.training")
    importlib.import_module("pipeline.rollout")
    importlib.import_module("pipeline.evaluate.stage")
    assert {
        "frechet_distance_pixels",
        "label_agreement",
        "loss",
        "learning_rate",
        "samples_per_second",
        "trajectories",
    } <= set(tracking.METRICS)
    assert all(name == metric.name and metric.meaning for name, metric in tracking.METRICS.items())


def test_a_rerun_goes_on_in_the_same_run(uri: str, tmp_path: Path):
    importlib.import_module("pipeline.training")
    with pytest.raises(RuntimeError), started(tmp_path) as first:
        first.metrics({"loss": 2.0}, step=50)
        raise RuntimeError("the disk is full")
    assert known(first).info.status == "FAILED"
    with started(tmp_path, spec=SampleSpec(model="other", out="o.png")) as second:
        assert second == first == tracking.run_of_output(str(tmp_path))
        assert known(second).info.status == "RUNNING"
        assert second.last_step("loss") == 50
        assert second.last_step("learning_rate") == 0
        second.metrics({"loss": 1.0}, step=100)
    found = known(second)
    assert found.info.status == "FINISHED"
    assert found.data.params["model"] == "m"
    assert found.data.tags["distillkac.rerun.model"] == "other"
    assert "distillkac.rerun.out" not in found.data.tags
    assert history(second, "loss") == [(50, 2.0), (100, 1.0)]
    assert tracking.find_runs("f", SPEC.stage)[0] == second


def test_another_fingerprint_is_another_run_and_a_lost_one_is_named(uri: str, tmp_path: Path):
    with started(tmp_path) as first:
        pass
    with started(tmp_path, "g") as other:
        pass
    assert "distillkac.continues" not in known(other).data.tags
    record = json.loads((tmp_path / "run.json").read_text())
    assert record == {"tracking_uri": uri, "run_id": other.run_id, "fingerprint": "g"} != first.run_id
    delivery.delivery_to(uri).sender.connected()[0].delete_run(other.run_id)
    with started(tmp_path, "g") as second:
        pass
    assert known(second).data.tags["distillkac.continues"] == other.run_id
    (tmp_path / "run.json").write_text(json.dumps({**record, "tracking_uri": "http://lost:5000", "run_id": "old"}))
    assert tracking.run_of_output(str(tmp_path)) is None
    with started(tmp_path, "g") as third:
        pass
    assert known(third).data.tags["distillkac.continues"] == "old"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_a_run_that_is_told_to_stop_is_killed(stop: BaseException, uri: str, tmp_path: Path):
    with pytest.raises(type(stop)), started(tmp_path) as run:
        raise stop
    assert known(run).info.status == "KILLED"


def test_what_a_run_was_made_with(uri: str, tmp_path: Path):
    data = tracking.Dataset("moons", "0123456789abcdef" * 4, "/data/moons")
    with started(tmp_path, datasets=[data]) as run, started(tmp_path, datasets=[data]):
        pass
    found = known(run)
    assert found.data.tags["mlflow.source.name"] == "python -m jobs.sample"
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert found.data.tags.get("mlflow.source.git.commit", "") == head
    (given,) = found.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("moons", "0123456789abcdef")
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_system_metrics_are_measured_and_go_on(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    name = "system/cpu_utilization_percentage"
    for most in (1, 3):
        with started(tmp_path) as run:
            deadline = time.monotonic() + 20
            while run.last_step(name) < most and time.monotonic() < deadline:
                time.sleep(0.1)
    steps = [step for step, _ in history(run, name)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 3


DYING = """
import os, sys
from pipeline import tracking
from pipeline.config import SampleSpec
with tracking.start_run(
    spec=SampleSpec(model="m", out="o.png"), fingerprint=sys.argv[2], inputs={}, output=sys.argv[1]
) as run, tracking.start_run(
    spec=SampleSpec(model="m", out="o.png"), fingerprint="inner", inputs={}, output=sys.argv[1] + "/in", parent=run
) as inner:
    inner.flush()
    run.flush()
    print(run.run_id, inner.run_id, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_runs_of_dead_processes_are_closed(uri: str, tmp_path: Path, project_root: Path):
    def die(name: str) -> list[str]:
        words = [sys.executable, "-c", DYING, str(tmp_path / name), name]
        ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=project_root)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        return ended.stdout.split()

    client, _ = tracking.connect(uri)
    outer, inner = die("a")
    other, other_inner = die("b")
    client.set_tag(other, processes.HOST_TAG, "elsewhere")
    client.set_tag(other_inner, processes.HOST_TAG, "elsewhere")
    with started(tmp_path / "a", "a") as run:
        assert run.run_id == outer
        assert client.get_run(inner).info.status == "KILLED", "nothing goes on with it"
        run.flush()
        assert {outer, inner, other} & set(tracking.close_dead(uri)) == set()
        assert known(run).info.status == "RUNNING"
    assert tracking.close_dead(uri, older_than=1.0) == []
    assert set(tracking.close_dead(uri, older_than=1e-9)) == {other, other_inner}
    assert client.get_run(other).info.status == "KILLED"


def test_a_server_that_goes_away_costs_nothing(
    uri: str, server: Away, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    importlib.import_module("pipeline.training")
    with started(tmp_path) as run:
        for step in range(1, 301):
            server.is_away = 100 <= step < 200
            run.metrics({"loss": 1 / step}, step=step)
            if step == 150:
                run.artifact("a/b.txt", b"text")
                run.tags({"seen": "yes"})
                time.sleep(0.3)
    assert server.asked_in_vain == {"tracking"}, "the work itself never waits for the server"
    found = known(run)
    assert history(run, "loss") == [(step, 1 / step) for step in range(1, 301)]
    assert (found.info.status, found.data.tags["seen"]) == ("FINISHED", "yes")
    client, _ = tracking.connect(uri)
    assert [file.path for file in client.list_artifacts(run.run_id, "a")] == ["a/b.txt"]
    assert capsys.readouterr().err.count("does not answer") == 1
    assert not list(local_folder().glob(f"{spill.name_of(uri)}-*.jsonl"))


def test_what_the_disk_refuses_waits_in_memory_beside_the_file(
    uri: str, server: Away, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    importlib.import_module("pipeline.training")
    append = spill.Spill.append

    def refusing(self: spill.Spill, entries: Any) -> None:
        if self and any(entry.step % 7 == 0 for entry in entries):
            raise OSError("no space left on device")
        append(self, entries)

    monkeypatch.setattr(spill.Spill, "append", refusing)
    with started(tmp_path) as run:
        for step in range(1, 301):
            server.is_away = 20 <= step < 280
            run.metrics({"loss": 1 / step}, step=step)
            if step % 40 == 0:
                time.sleep(0.1)
        server.is_away = False
    assert sorted(history(run, "loss")) == [(step, 1 / step) for step in range(1, 301)]
    assert known(run).info.status == "FINISHED"


def test_a_server_that_is_away_at_the_start_gets_the_run_later(
    uri: str, server: Away, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    importlib.import_module("pipeline.training")
    server.is_away = True
    with started(tmp_path) as run, started(tmp_path / "in", "late", parent=run) as inner:
        inner.metrics({"loss": 1.0}, step=1)
        inner.image("samples", PNG, step=1)
    assert run.run_id.startswith("local-")
    server.is_away = False
    found = known(inner)
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.parentRunId"] == known(run).info.run_id
    assert found.data.tags["mlflow.loggedImages"] == "True"
    client, _ = tracking.connect(uri)
    pictures = [file.path for file in client.list_artifacts(found.info.run_id, "images")]
    assert len(pictures) == 2 and all(path.startswith("images/samples+step+1+timestamp+") for path in pictures)
    with started(tmp_path) as again:
        assert known(again).info.run_id == known(run).info.run_id
    assert len(tracking.find_runs("late")) == 1


def test_what_a_killed_process_left_is_delivered_by_the_next_run(uri: str, server: Away, tmp_path: Path):
    """Twice, in part: what the server had already stays one."""
    importlib.import_module("pipeline.training")
    with started(tmp_path) as run:
        run.metrics({"loss": 0.0}, step=1)
    known(run)
    lost = spill.Spill(uri)
    entries = [Entry(run.run_id, "metrics", {"loss": float(step)}, time=step, step=step) for step in range(2, 2002)]
    lost.append(entries)
    assert lost._file is not None
    path = lost.path
    with started(tmp_path / "other", "other"):
        pass
    assert len(history(run, "loss")) == 1, "its process is alive"
    lost._file.write(b'{"run_id": "cut o')
    lost._file.close()
    data = path.read_bytes()
    assert tracking.sync(uri) == (2000, 0)
    assert not path.exists()
    path.write_bytes(data)
    with started(tmp_path / "other", "other"):
        pass
    assert history(run, "loss") == [(1, 0.0), *((step, float(step)) for step in range(2, 2002))]
    assert not path.exists()


def test_a_full_queue_goes_on_in_a_file_in_order(
    uri: str, server: Away, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(delivery, "MOST_ENTRIES", 20)
    with started(tmp_path) as run:
        for number in range(500):
            run.tags({"number": str(number)})
    assert known(run).data.tags["number"] == "499"


def test_what_the_server_refuses_does_not_hold_up_the_rest(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with started(tmp_path) as run:
        run.tags({"good": "1", "bad name: \n?": "2"})
        run.tags({"better": "3"})
    assert known(run).data.tags["better"] == "3"
    assert capsys.readouterr().err.count("refused by") == 1


def test_a_server_that_will_not_have_us_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://me:secret@host")
    with (
        pytest.raises(DistillKacError, match="MLFLOW_TRACKING_URI=nonsense://host ") as refused,
        started(tmp_path),
    ):
        pass
    assert "secret" not in str(refused.value)


@pytest.fixture
def experiment(uri: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of an experiment of this test's own, which new runs are created in."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    return tracking.connect(uri)[1]


def test_runs_are_created_in_the_experiment_that_the_environment_names(uri: str, experiment: str, tmp_path: Path):
    with started(tmp_path, "of another experiment") as run:
        pass
    assert known(run).info.experiment_id == experiment
    assert MlflowClient(uri).get_experiment(experiment).name == "another"
    assert tracking.find_runs("of another experiment") == [run]


def test_a_deleted_experiment_is_one_line_before_the_work(
    uri: str, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    client = MlflowClient(uri)
    with started(tmp_path) as run:
        pass
    client.delete_experiment(experiment)
    with pytest.raises(DistillKacError, match=f"restore --experiment-id {experiment}") as refused, started(tmp_path):
        pytest.fail("the work has started")
    assert "MLFLOW_EXPERIMENT_NAME" in str(refused.value) and "\n" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "a third")
    with started(tmp_path) as elsewhere:
        pass
    assert known(elsewhere).data.tags[runs.CONTINUES_TAG] == run.run_id
    client.restore_experiment(experiment)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    with started(tmp_path / "restored") as again:
        pass
    assert known(again).info.experiment_id == experiment
    client.delete_experiment(experiment)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_does_not_admit_us_is_one_line_at_once(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>\nno\n</html>")

        def log_message(self, format: str, *arguments: Any) -> None:
            """Stay silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(DistillKacError, match=address) as refused, started(tmp_path):
            pytest.fail("the work has started")
        server.shutdown()
    assert str(status) in str(refused.value) and "\n" not in str(refused.value)


def test_a_shortened_parameter_is_marked(uri: str, tmp_path: Path):
    with started(tmp_path) as run:
        run.params({"whole": "a" * 500, "shortened": "b" * 501})
    params = known(run).data.params
    assert params["whole"] == "a" * 500
    assert params["shortened"] == "b" * 499 + "…"


def test_one_request_takes_what_mlflow_takes():
    def entry(kind: str, count: int, run_id: str = "r") -> Entry:
        return Entry(run_id, kind, dict.fromkeys(map(str, range(count)), 0.0))

    assert len(first_batch([entry("metrics", 500)] * 3)) == 2
    assert len(first_batch([entry("tags", 60), entry("metrics", 5), entry("tags", 60)])) == 2
    assert len(first_batch([entry("metrics", 5), entry("metrics", 5, "s")])) == 1
    assert len(first_batch([entry("file", 1), entry("metrics", 5)])) == 1
    assert len(first_batch([entry("metrics", 5)] * 4)) == 4


TWO = """
import sys
from pathlib import Path
from pipeline import tracking
from pipeline.config import SampleSpec
Path(sys.argv[1] + "/ready-" + sys.argv[2]).touch()
while len(list(Path(sys.argv[1]).glob("ready-*"))) < 2:
    pass
out = sys.argv[1] + "/" + sys.argv[2]
with tracking.start_run(spec=SampleSpec(model="m", out="o"), fingerprint="f", inputs={}, output=out):
    pass
"""


def test_two_processes_can_create_one_database(tmp_path: Path, project_root: Path):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    words = [sys.executable, "-c", TWO, str(tmp_path)]
    both = [
        subprocess.Popen([*words, name], env=environment, cwd=project_root, stderr=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert len(tracking.find_runs("f", uri=environment["MLFLOW_TRACKING_URI"])) == 2


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001"
    "f61738550000000049454e44ae426082"
)
