"""Log entries, and the requests to MLflow that deliver them.

Delivering an entry twice is harmless. MLflow stores two metrics with the same name, step, value and time as one point,
and a file with the same name as one file. Every other entry sets a value.
"""

import base64
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kac.util.errors import DistillKacError, without_keys
from pipeline.tracking.server import connect, experiment_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

REQUEST_LIMITS = {"metrics": 1000, "params": 100, "tags": 100}
"""The maximum number of values in one MLflow request. Each entry of any other kind needs its own request."""

DIGEST_LENGTH = 16
"""Number of hexadecimal digits in a dataset's digest. MLflow's databases accept at most 36 characters."""

LOCAL = "local-"
"""Prefix of a run's local id, which the run has until the server answers and creates the run."""

LOCAL_ID_TAG, PARENT_TAG, RERUN_TAG = "distillkac.local_id", "mlflow.parentRunId", "distillkac.rerun."

Kind = Literal["create", "metrics", "params", "tags", "file", "datasets", "status"]


def now() -> int:
    """The time in milliseconds, as MLflow stores it."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Entry:
    """A change to one run, with the time at which it was logged."""

    run_id: str
    kind: Kind
    content: dict[str, Any]  # a single value if the kind is metrics, params or tags
    time: int = field(default_factory=now)
    step: int = 0

    def line(self) -> bytes:
        """The entry as one line of JSON."""
        return json.dumps(vars(self)).encode() + b"\n"


def first_batch(entries: Sequence[Entry]) -> list[Entry]:
    """The leading entries that one request can deliver."""
    first = entries[0]
    alike = takewhile(lambda entry: (entry.run_id, entry.kind) == (first.run_id, first.kind), entries)
    return list(islice(alike, REQUEST_LIMITS.get(first.kind, 1)))


class RunNotCreatedYet(DistillKacError):
    """The server does not have this run yet. Another process will create it."""


class Sender:
    """Sends log entries to one server."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._known: dict[str, str] = {}  # the server's run ids, by local id
        self._connected: dict[str, tuple[MlflowClient, str]] = {}  # by experiment name

    def connected(self) -> tuple["MlflowClient", str]:
        """A client, and the experiment's id."""
        name = experiment_name()
        if name not in self._connected:
            self._connected[name] = connect(self.uri)
        return self._connected[name]

    def id_of(self, run_id: str) -> str:
        """The server's id for a run. Raises ``RunNotCreatedYet`` if the server does not have the run."""
        if not run_id.startswith(LOCAL):
            return run_id
        if run_id not in self._known:
            client, experiment = self.connected()
            found = client.search_runs([experiment], f"tags.`{LOCAL_ID_TAG}` = '{run_id}'", max_results=1)
            if not found:
                raise RunNotCreatedYet(f"{without_keys(self.uri)} does not have the run {run_id} yet.")
            self._known[run_id] = str(found[0].info.run_id)
        return self._known[run_id]

    def create(self, tags: dict[str, str], started: int) -> str:
        """Create a run and return its id."""
        client, experiment = self.connected()
        return str(client.create_run(experiment, start_time=started, tags=self._with_parent(tags)).info.run_id)

    def send(self, batch: list[Entry]) -> None:
        """Deliver a batch from ``first_batch``. Raises any error of MLflow."""
        from mlflow.entities import Metric, RunTag

        first = batch[0]
        if first.kind == "create":
            try:
                self.id_of(first.run_id)  # an earlier attempt may have created the run, although its answer was lost
            except RunNotCreatedYet:
                self._known[first.run_id] = self.create({**first.content, LOCAL_ID_TAG: first.run_id}, first.time)
            return
        client, run_id = self.connected()[0], self.id_of(first.run_id)
        values = {name: value for entry in batch for name, value in entry.content.items()}
        if first.kind == "metrics":
            points = [Metric(name, value, e.time, e.step) for e in batch for name, value in e.content.items()]
            client.log_batch(run_id, metrics=points)
        elif first.kind == "tags":
            client.log_batch(run_id, tags=[RunTag(*tag) for tag in self._with_parent(values).items()])
        elif first.kind == "params":
            _send_params(client, run_id, values)
        elif first.kind == "file":
            _send_file(client, run_id, values)
        elif first.kind == "datasets":
            _send_datasets(client, run_id, values["datasets"])
        elif values["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, values["status"], first.time)

    def _with_parent(self, tags: dict[str, str]) -> dict[str, str]:
        return {name: self.id_of(value) if name == PARENT_TAG else value for name, value in tags.items()}


def _send_params(client: "MlflowClient", run_id: str, params: dict[str, str]) -> None:
    """Log parameters. MLflow never changes a parameter, so a new value in a rerun becomes a tag."""
    from mlflow.entities import Param, RunTag
    from mlflow.exceptions import MlflowException

    try:
        client.log_batch(run_id, params=[Param(name, value) for name, value in params.items()])
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        known = client.get_run(run_id).data.params
        changed = {name: value for name, value in params.items() if known.get(name, value) != value}
        client.log_batch(
            run_id,
            params=[Param(name, value) for name, value in params.items() if name not in known],
            tags=[RunTag(RERUN_TAG + name, value) for name, value in changed.items()],
        )


def _send_file(client: "MlflowClient", run_id: str, content: dict[str, Any]) -> None:
    folder, _, name = content["name"].rpartition("/")
    scratch = Path(tempfile.mkdtemp())  # a TemporaryDirectory would be removed too early when the process ends
    try:
        (scratch / name).write_bytes(base64.b64decode(content["data"]))
        client.log_artifact(run_id, str(scratch / name), folder or None)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _send_datasets(client: "MlflowClient", run_id: str, datasets: list[dict[str, str]]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for dataset in datasets:
        scheme, is_uri, _ = dataset["path"].partition("://")
        source = scheme if is_uri else "local", json.dumps({"uri": dataset["path"]})
        described = Dataset(dataset["name"], dataset["digest"][:DIGEST_LENGTH], *source)
        inputs.append(DatasetInput(described, [InputTag("mlflow.data.context", dataset["context"])]))
    client.log_inputs(run_id, inputs)
