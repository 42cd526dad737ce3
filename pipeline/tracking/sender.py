"""Turn log entries into requests to MLflow."""

import base64
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kac.util.errors import DistillKacError
from pipeline.tracking.entries import Entry, split_content
from pipeline.tracking.server import connect, experiment_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCAL = "local-"
"""Prefix of the id that a run has in this project until an absent server can create it."""

LOCAL_ID_TAG, PARENT_TAG, RERUN_TAG = "distillkac.local_id", "mlflow.parentRunId", "distillkac.rerun."


class RunNotCreatedYet(DistillKacError):
    """The server does not have this run yet. Another process will create it."""


class Sender:
    """Sends log entries to one server."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._known: dict[str, str] = {}  # the server's ids by local ids
        self._connected: dict[str, tuple[MlflowClient, str]] = {}  # by name of the experiment

    def connected(self) -> tuple["MlflowClient", str]:
        """A client, and the id of the experiment."""
        name = experiment_name()
        if name not in self._connected:
            self._connected[name] = connect(self.uri)
        return self._connected[name]

    def id_of(self, run_id: str) -> str:
        """The server's id of a run.

        Raises:
            RunNotCreatedYet: the server does not have the run yet.
        """
        if not run_id.startswith(LOCAL):
            return run_id
        if run_id not in self._known:
            client, experiment = self.connected()
            found = client.search_runs([experiment], f"tags.`{LOCAL_ID_TAG}` = '{run_id}'", max_results=1)
            if not found:
                raise RunNotCreatedYet(f"{self.uri} does not have the run {run_id} yet.")
            self._known[run_id] = str(found[0].info.run_id)
        return self._known[run_id]

    def create(self, tags: dict[str, str], started: int) -> str:
        """Create a run; returns its id."""
        client, experiment = self.connected()
        tags = dict(tags)
        if PARENT_TAG in tags:
            tags[PARENT_TAG] = self.id_of(tags[PARENT_TAG])
        return str(client.create_run(experiment, start_time=started, tags=tags).info.run_id)

    def send(self, batch: list[Entry]) -> None:
        """Deliver a batch of ``first_batch``.

        Raises:
            Exception: any error of MLflow.
        """
        first = batch[0]
        if first.kind == "create":
            try:
                self.id_of(first.run_id)  # the run may exist, if the server's answer was lost
            except RunNotCreatedYet:
                self._known[first.run_id] = self.create({**first.content, LOCAL_ID_TAG: first.run_id}, first.time)
            return
        client, _ = self.connected()
        run_id = self.id_of(first.run_id)
        if first.kind == "file":
            _send_file(client, run_id, first.content)
        elif first.kind == "datasets":
            _send_datasets(client, run_id, first.content["datasets"])
        elif first.kind == "status":
            _send_status(client, run_id, first)
        else:
            _send_values(client, run_id, [self._with_parent(entry) for entry in batch])

    def _with_parent(self, entry: Entry) -> Entry:
        if entry.kind != "tags" or PARENT_TAG not in entry.content:
            return entry
        return replace(entry, content={**entry.content, PARENT_TAG: self.id_of(entry.content[PARENT_TAG])})


def _send_values(client: "MlflowClient", run_id: str, batch: list[Entry]) -> None:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    metrics = [
        Metric(name, value, entry.time, entry.step)
        for entry in batch
        if entry.kind == "metrics"
        for name, value in entry.content.items()
    ]
    params, tags = (
        {name: value for entry in batch if entry.kind == kind for name, value in entry.content.items()}
        for kind in ("params", "tags")
    )
    if params:
        try:
            client.log_batch(run_id, params=[Param(name, value) for name, value in params.items()])
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            _send_changed(client, run_id, params)
    if metrics or tags:
        client.log_batch(run_id, metrics=metrics, tags=[RunTag(name, value) for name, value in tags.items()])


def _send_changed(client: "MlflowClient", run_id: str, params: dict[str, str]) -> None:
    """Log the parameters of a rerun. MLflow never changes a parameter, so that a new value becomes a tag."""
    from mlflow.entities import Param, RunTag

    known: dict[str, str] = client.get_run(run_id).data.params
    client.log_batch(
        run_id,
        params=[Param(name, value) for name, value in params.items() if name not in known],
    )
    changed = {RERUN_TAG + name: value for name, value in params.items() if known.get(name, value) != value}
    for part in split_content("tags", changed):
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in part.items()])


def _send_file(client: "MlflowClient", run_id: str, content: dict[str, Any]) -> None:
    folder, _, name = content["name"].rpartition("/")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        path.write_bytes(base64.b64decode(content["data"]))
        client.log_artifact(run_id, str(path), folder or None)


def _send_datasets(client: "MlflowClient", run_id: str, datasets: list[dict[str, str]]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client.log_inputs(
        run_id,
        [
            DatasetInput(
                Dataset(dataset["name"], dataset["digest"], dataset["source_type"], dataset["source"]),
                [InputTag("mlflow.data.context", dataset["context"])],
            )
            for dataset in datasets
        ],
    )


def _send_status(client: "MlflowClient", run_id: str, entry: Entry) -> None:
    if entry.content["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, entry.content["status"], entry.time)
