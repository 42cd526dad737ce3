"""A run a thing: begun or gone on with, written to from any process, and ended whatever happens."""

import base64
import contextlib
import io
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kac.util import files
from kac.util.errors import DistillKacError, one_line
from kac.util.options import flatten
from pipeline import claims
from pipeline.config.specs import Spec
from pipeline.tracking import processes
from pipeline.tracking.delivery import END_SECONDS, Delivery, delivery_to
from pipeline.tracking.entries import Entry, Kind, split
from pipeline.tracking.metrics import SYSTEM_PREFIX, check_declared
from pipeline.tracking.sender import LOCAL, PARENT_TAG, NotThereYet
from pipeline.tracking.server import EXPERIMENT_VARIABLE, RUN_FILE, is_refusal, tracking_uri, without_password
from pipeline.tracking.source import Dataset, source_tags
from pipeline.tracking.system import system_metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient

STAGE_TAG, FINGERPRINT_TAG, INPUT_TAG = "distillkac.stage", "distillkac.fingerprint", "distillkac.input."
CONTINUES_TAG = "distillkac.continues"

START_SECONDS, NESTED_SECONDS = 60.0, 10.0
"""How long a run waits for a server that does not answer at its start; nested ones wait less: it did a moment ago."""

KILLED_SECONDS = 2.0
"""Ray kills a job that has not ended three seconds after it was told to."""

PARAM_LENGTH = 500
"""Longest value of a parameter that this project logs; longer values end in an ellipsis."""

THUMBNAIL = 256
"""Largest side in pixels of the small copy that MLflow's pages show of a picture in a series."""


@dataclass(frozen=True)
class TrackedRun:
    """A run of MLflow that any process can write to: only text, so that it travels to workers.

    What is written waits in a queue (``delivery.py``): no call here fails or waits because of the server. A run with an
    empty URI is nowhere, and keeps nothing.
    """

    tracking_uri: str
    run_id: str

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log metrics of ``METRICS``, and parts of the loss.

        Raises:
            KeyError: another name.
        """
        check_declared(values)
        numbers = {name: float(value) for name, value in values.items()}
        self._put(*(Entry(self.run_id, "metrics", part, step=step) for part in split("metrics", numbers)))

    def tags(self, values: dict[str, str]) -> None:
        """Set tags."""
        self._put(*(Entry(self.run_id, "tags", part) for part in split("tags", values)))

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters; of a rerun those that have changed become tags ``distillkac.rerun.<name>``."""
        texts = {name: _shortened(str(value)) for name, value in values.items()}
        self._put(*(Entry(self.run_id, "params", part) for part in split("params", texts)))

    def artifact(self, name: str, data: bytes) -> None:
        """Attach a file; its name may have folders."""
        self._put(self._entry("file", {"name": name, "data": base64.b64encode(data).decode()}))

    def image(self, name: str, png: bytes, step: int) -> None:
        """Add a picture to the series ``name``."""
        from PIL import Image

        picture, small = Image.open(io.BytesIO(png)), io.BytesIO()
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.convert("RGB").save(small, "webp")
        # The names by which MLflow's pages find the pictures of a series, as its client makes them.
        now = time.time_ns() // 1_000_000
        path = f"images/{name.replace('/', '~')}+step+{step}+timestamp+{now}+{uuid.uuid4()}"
        self.artifact(f"{path}.png", png)
        self.artifact(f"{path}+compressed.webp", small.getvalue())
        self.tags({"mlflow.loggedImages": "True"})

    def datasets(self, datasets: Sequence[Dataset]) -> None:
        """Name what the run reads."""
        if datasets:
            self._put(self._entry("datasets", {"datasets": [dataset.values() for dataset in datasets]}))

    def last_step(self, name: str) -> int:
        """The last step of a metric that the server has; 0 if it has none, or does not answer."""
        history = self._asked(lambda client, run_id: client.get_metric_history(run_id, name), [])
        return max((int(point.step) for point in history), default=0)

    def last_metrics(self) -> dict[str, float]:
        """The metrics that the server has, each as it was logged last; none if it does not answer."""
        return dict(self._asked(lambda client, run_id: client.get_run(run_id).data.metrics, {}))

    def status(self) -> str:
        """What the server has: RUNNING, FINISHED, FAILED or KILLED; empty if it does not answer."""
        return str(self._asked(lambda client, run_id: client.get_run(run_id).info.status, ""))

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End a run of which the process is over; ``start_run`` ends its own."""
        self._put(self._entry("status", {"status": status}))

    def nest(self, parent: "TrackedRun") -> None:
        """Show the run below another one."""
        self.tags({PARENT_TAG: parent.run_id})

    def flush(self, seconds: float = END_SECONDS) -> bool:
        """Wait until all that this process has logged is with the server, or on disk if the server fails.

        Returns:
            Whether the server has it all.
        """
        return not self.tracking_uri or delivery_to(self.tracking_uri).flush(seconds, on_disk_is_enough=True)

    def _asked(self, ask: Callable[["MlflowClient", str], Any], otherwise: Any) -> Any:
        """What the server says, or ``otherwise`` if it fails: the work goes on without."""
        if not self.tracking_uri:
            return otherwise
        sender = delivery_to(self.tracking_uri).sender
        try:
            client, _ = sender.connected()
            return ask(client, sender.id_of(self.run_id))
        except Exception:  # noqa: BLE001 - MLflow's stores raise what they like
            return otherwise

    def _entry(self, kind: Kind, content: dict[str, Any]) -> Entry:
        return Entry(self.run_id, kind, content)

    def _put(self, *entries: Entry) -> None:
        if self.tracking_uri:
            delivery_to(self.tracking_uri).put(*entries)


@contextmanager
def start_run(
    *,
    spec: Spec,
    fingerprint: str,
    inputs: dict[str, str],
    output: str,
    parent: TrackedRun | None = None,
    name: str | None = None,
    stage: str | None = None,
    datasets: Sequence[Dataset] = (),
) -> Iterator[TrackedRun]:
    """The run of the spec's stage; ended as FINISHED, KILLED if the process is told to stop, or else FAILED.

    At its end the claim of the job on ``output`` ends, too.

    A rerun goes on in the run that ``OUTPUT/run.json`` names. If that is on another server, or gone, the new run has a
    tag ``distillkac.continues``.

    Args:
        fingerprint: of what the stage makes. inputs: fingerprints of what it is made from, by stage.
        output: where the stage writes. parent: the run to nest this one under.
        name: what the run is called in MLflow; default: the stage.
        stage: another than the spec's: such a run has no file of its own and is always a new one.
        datasets: what it reads.

    Raises:
        DistillKacError: the server will not have us; one that does not answer is no error.
    """
    uri = parent.tracking_uri if parent else tracking_uri(output)
    tags = {
        "mlflow.runName": name or stage or spec.stage,
        STAGE_TAG: stage or spec.stage,
        FINGERPRINT_TAG: fingerprint,
        **{f"{INPUT_TAG}{made_by}": value for made_by, value in inputs.items()},
        **source_tags(spec.stage),
        **processes.tags(),
        **({PARENT_TAG: parent.run_id} if parent else {}),
    }
    run = _open(uri, tags, None if stage else output, is_nested=parent is not None)
    run.params(flatten(spec.model_dump(mode="json")))
    run.datasets(datasets)
    measuring = contextlib.nullcontext() if stage else system_metrics(_in_steps(run))
    status, seconds = "FAILED", END_SECONDS
    try:
        with measuring:
            yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status, seconds = "KILLED", KILLED_SECONDS
        raise
    finally:
        _end(run, status, seconds)
        if not stage:
            claims.release(output)


def run_of_output(out: str) -> TrackedRun | None:
    """The run that an output was made in, if that is on the server that is used now."""
    record, uri = _read_record(out), tracking_uri(out)
    if record is None or record["tracking_uri"] != without_password(uri):
        return None
    return TrackedRun(uri, record["run_id"])


def find_runs(fingerprint: str, stage: str | None = None, uri: str | None = None) -> list[TrackedRun]:
    """The runs that made what has this fingerprint, the newest first; none if the server does not answer.

    An empty fingerprint names nothing.

    Args:
        stage: of this stage alone. uri: the server; default: ``tracking_uri`` of the current directory.
    """
    uri = uri or tracking_uri(".")
    if not fingerprint:
        return []
    which = f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'" + (f" and tags.`{STAGE_TAG}` = '{stage}'" if stage else "")
    try:
        client, experiment = delivery_to(uri).sender.connected()
        found = client.search_runs([experiment], which, order_by=["attributes.start_time DESC"])
    except Exception:  # noqa: BLE001 - as above
        return []
    return [TrackedRun(uri, str(run.info.run_id)) for run in found]


def _open(uri: str, tags: dict[str, str], output: str | None, is_nested: bool) -> TrackedRun:
    """The run of an output, or a new one; ``output`` None: a new one, of no output."""
    delivery = delivery_to(uri)
    is_up = _answers(delivery, 0.0 if delivery.is_failing else NESTED_SECONDS if is_nested else START_SECONDS)
    if is_up:
        delivery.deliver_leftovers()  # of this machine, which may be another one than the driver's
    record = _read_record(output) if output else None
    if record is not None and record["fingerprint"] == tags[FINGERPRINT_TAG]:
        if record["tracking_uri"] == without_password(uri) and not (is_up and _is_gone(delivery, record["run_id"])):
            return _go_on(TrackedRun(uri, record["run_id"]), tags, is_up)
        tags = {**tags, CONTINUES_TAG: record["run_id"]}
    run = _create(delivery, tags, is_up)
    if output:
        written = {
            "tracking_uri": without_password(uri),
            "run_id": run.run_id,
            "fingerprint": tags[FINGERPRINT_TAG],
        }
        files.write_bytes(files.join(output, RUN_FILE), json.dumps(written, indent=2).encode())
    return run


def _answers(delivery: Delivery, seconds: float) -> bool:
    try:
        return delivery.wait_for_server(seconds)
    except DistillKacError:
        raise
    except Exception as error:
        raise DistillKacError(
            f"MLFLOW_TRACKING_URI={without_password(delivery.uri)} is no tracking server or database that can be used: "
            f"{_safe(error)}. Set another address."
        ) from error


def _shortened(text: str) -> str:
    return text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"


def _safe(error: Exception) -> str:
    return without_password(one_line(error))


def _is_gone(delivery: Delivery, run_id: str) -> bool:
    try:
        client, _ = delivery.sender.connected()
        return bool(client.get_run(delivery.sender.id_of(run_id)).info.lifecycle_stage != "active")
    except NotThereYet:
        return True
    except Exception as error:  # noqa: BLE001 - as above
        return is_refusal(error)


def _go_on(run: TrackedRun, tags: dict[str, str], is_up: bool) -> TrackedRun:
    delivery = delivery_to(run.tracking_uri)
    delivery.put(Entry(run.run_id, "status", {"status": "RUNNING"}))
    run.tags(tags)
    if is_up:
        # Of a server that has just failed, the next start asks again.
        with contextlib.suppress(Exception):
            client, experiment = delivery.sender.connected()
            dead = processes.dead_below(client, experiment, delivery.sender.id_of(run.run_id))
            # Through the queue, which tries again: SQLite refuses one of two writers at once.
            delivery.put(*(Entry(run_id, "status", {"status": "KILLED"}) for run_id in dead))
            run.flush()
    return run


def _create(delivery: Delivery, tags: dict[str, str], is_up: bool) -> TrackedRun:
    now = time.time_ns() // 1_000_000
    if is_up and not tags.get(PARENT_TAG, "").startswith(LOCAL):
        try:
            return TrackedRun(delivery.uri, delivery.sender.create(tags, now))
        except Exception as error:
            if is_refusal(error, at_start=True):
                raise DistillKacError(
                    f"{without_password(delivery.uri)} refuses a new run: {_safe(error)}. Set another address in "
                    f"MLFLOW_TRACKING_URI, or another experiment in {EXPERIMENT_VARIABLE}."
                ) from error
    run = TrackedRun(delivery.uri, f"{LOCAL}{uuid.uuid4().hex}")
    delivery.put(Entry(run.run_id, "create", tags, now))
    return run


def _end(run: TrackedRun, status: str, seconds: float) -> None:
    delivery = delivery_to(run.tracking_uri)
    delivery.put(Entry(run.run_id, "status", {"status": status}))
    if run.flush(seconds) and status != "KILLED":
        delivery.deliver_leftovers()


def _in_steps(run: TrackedRun) -> Callable[[dict[str, float]], None]:
    """Logs each measurement as a step of its own, after those of the run so far."""
    next_step: list[int] = []

    def log(values: dict[str, float]) -> None:
        if not next_step:
            next_step.append(run.last_step(f"{SYSTEM_PREFIX}cpu_utilization_percentage") + 1)
        run.metrics(values, step=next_step[0])
        next_step[0] += 1

    return log


def _read_record(out: str) -> dict[str, str] | None:
    """What ``run.json`` says; None without one, or if it is not whole: tracking holds up no work."""
    try:
        record = json.loads(files.read_bytes(files.join(out, RUN_FILE)))
        return {name: str(record[name]) for name in ("tracking_uri", "run_id", "fingerprint")}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
