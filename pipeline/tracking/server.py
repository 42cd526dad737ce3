"""The tracking server, or a local database that takes its place."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kac.util.cache import cache_folder
from kac.util.errors import DistillKacError, without_keys
from pipeline.cluster.connection import in_job_copy
from pipeline.cluster.environment import database_file, mlflow_address

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT, EXPERIMENT_VARIABLE = "distillkac", "MLFLOW_EXPERIMENT_NAME"
"""The experiment of all runs, unless MLflow's own variable names another."""

RUN_FILE = "run.json"
"""Beside an output: which run it was made in."""

REQUEST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Delivery tries again by itself: MLflow's own retries would hold a request for minutes and print a line each."""

REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE"}

START_REFUSALS = {"CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED"}
"""A job ends with one of these at its start. Later the entries wait, because a token or a proxy may come back."""


class DeletedExperimentError(DistillKacError):
    """The experiment was deleted, and takes no runs until it is restored."""


def tracking_uri(beside: str) -> str:
    """MLFLOW_TRACKING_URI, or ``mlflow.db`` in the current directory.

    A submitted job's directory does not outlive it: its database lies beside the stage's output ``beside``.

    Raises:
        ArgumentError: MLFLOW_TRACKING_URI or MLFLOW_REGISTRY_URI is no address that MLflow can use.
    """
    if configured := mlflow_address():
        return configured
    folder = os.getcwd()
    if in_job_copy() and "://" not in beside:
        folder = os.path.dirname(os.path.abspath(beside))
    return f"sqlite:///{os.path.join(folder, 'mlflow.db')}"


def without_password(uri: str) -> str:
    """The address as it may be shown and stored."""
    return without_keys(uri)


def connect(uri: str) -> tuple["MlflowClient", str]:
    """A client of the server, and the id of the experiment there, which is created if there is none.

    Raises:
        DeletedExperimentError: the experiment was deleted.
        Exception: whatever MLflow raises if the server does not answer, see ``is_refusal``.
    """
    from mlflow.exceptions import MlflowException

    with _alone(uri):
        _make_database(uri)
        client = client_of(uri)
        name = experiment_name()
        found = client.get_experiment_by_name(name)
        if found is None:
            # A local database names the folder of its artifacts itself, or it would be that of whichever process came
            # first.
            file = database_file(uri)
            location = file.with_name("mlartifacts").as_uri() if file else None
            try:
                return client, str(client.create_experiment(name, artifact_location=location))
            except MlflowException:  # another host may have been first
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
    if found.lifecycle_stage != "active":
        raise DeletedExperimentError(
            f"The MLflow experiment {name!r} at {without_password(uri)} was deleted. Restore it (mlflow experiments "
            f"restore --experiment-id {found.experiment_id}) or name another experiment in {EXPERIMENT_VARIABLE}."
        )
    return client, str(found.experiment_id)


def client_of(uri: str) -> "MlflowClient":
    """A client of the server; a fresh local database is left to ``connect``."""
    from mlflow import MlflowClient

    for name, value in REQUEST.items():
        os.environ.setdefault(name, value)
    if without_password(uri) != uri:  # MLflow prints the address of a run that has ended
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    return MlflowClient(uri)


def experiment_name() -> str:
    """The name of the experiment that runs are created in."""
    return os.environ.get(EXPERIMENT_VARIABLE, "").strip() or EXPERIMENT


def is_refusal(error: Exception, *, at_start: bool = False) -> bool:
    """Whether the server has understood the request and refuses it, so that another attempt would change nothing.

    Args:
        at_start: count ``START_REFUSALS`` too.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, DeletedExperimentError):
        return True
    if isinstance(error, MlflowException):
        return str(error.error_code) in (REFUSALS | START_REFUSALS if at_start else REFUSALS)
    return isinstance(error, KeyError | TypeError | ValueError) and not isinstance(error, OSError)


def local_folder() -> Path:
    """A folder of this machine for what waits to be delivered: below the cache, unless that is an S3 prefix."""
    folder = Path(cache_folder("tracking"))
    if "://" in cache_folder():
        folder = Path.home() / ".cache" / "distillkac" / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def name_of(uri: str) -> str:
    """A file name for a server."""
    return hashlib.sha256(without_password(uri).encode()).hexdigest()[:16]


def _make_database(uri: str) -> None:
    """A fresh SQLite database appears whole: MLflow cannot use one whose maker was killed halfway."""
    path = database_file(uri)
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    fresh.unlink(missing_ok=True)
    client_of(f"sqlite:///{fresh}").search_experiments(max_results=1)
    fresh.replace(path)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time: two that create the tables of a fresh SQLite database at once crash in MLflow."""
    if not uri.startswith("sqlite:"):
        yield
        return
    with (local_folder() / f"{name_of(uri)}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
