"""Access to the tracking server, or to a local database that replaces it."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from kac.util.cache import cache_folder
from kac.util.errors import DistillKacError, without_keys
from pipeline.cluster.connection import in_job_copy
from pipeline.cluster.environment import database_file, mlflow_address

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT, EXPERIMENT_VARIABLE = "distillkac", "MLFLOW_EXPERIMENT_NAME"
"""The experiment for all runs, unless this variable of MLflow names a different experiment."""

RUN_FILE = "run.json"
"""A file in an output's folder that names the run that made the output."""

REQUEST = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Settings that turn off MLflow's retries, which take minutes and print a line each. ``delivery.py`` retries."""

REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE"}
"""MLflow's error codes for a request that will never succeed."""

START_REFUSALS = {"CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED"}
"""Further error codes, which end a job only at its start. Later, entries wait until the token or proxy is fixed."""

_is_off: ContextVar[bool] = ContextVar("_is_off", default=False)


class DeletedExperimentError(DistillKacError):
    """The experiment was deleted. It accepts no runs until it is restored."""


@contextmanager
def tracking_off() -> Iterator[None]:
    """Within this context, runs are not tracked and no database is created."""
    token = _is_off.set(True)
    try:
        yield
    finally:
        _is_off.reset(token)


def tracking_uri(output: str) -> str:
    """The address of the tracking server: MLFLOW_TRACKING_URI, or else ``mlflow.db`` in the current directory.

    A submitted job's ``mlflow.db`` is next to its ``output``, since Ray deletes the job's directory. Within
    ``tracking_off``, the address is empty.

    Raises:
        ArgumentError: MLflow cannot use MLFLOW_TRACKING_URI or MLFLOW_REGISTRY_URI.
    """
    if _is_off.get():
        return ""
    if configured := mlflow_address():
        return configured
    is_deleted = in_job_copy() and "://" not in output
    folder = os.path.dirname(os.path.abspath(output)) if is_deleted else os.getcwd()
    return f"sqlite:///{os.path.join(folder, 'mlflow.db')}"


def experiment_name() -> str:
    """The name of the experiment for new runs."""
    return os.environ.get(EXPERIMENT_VARIABLE, "").strip() or EXPERIMENT


def connect(uri: str) -> tuple["MlflowClient", str]:
    """A client for the server, and the experiment's id. The experiment is created if it does not exist.

    Raises:
        DeletedExperimentError: the experiment was deleted.
        Exception: any MLflow error, for example if the server does not answer; see ``is_refusal``.
    """
    from mlflow.exceptions import MlflowException

    with _locked(uri):
        client, name = client_of(uri), experiment_name()
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            # By default, MLflow would put the artifacts into the working directory of the first process.
            file = database_file(uri)
            location = file.with_name("mlartifacts").as_uri() if file else None
            try:
                return client, str(client.create_experiment(name, artifact_location=location))
            except MlflowException:  # another host may have just created the experiment
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
    if experiment.lifecycle_stage != "active":
        raise DeletedExperimentError(
            f"The MLflow experiment {name!r} at {without_keys(uri)} was deleted. Restore it (mlflow experiments "
            f"restore --experiment-id {experiment.experiment_id}), or set {EXPERIMENT_VARIABLE} to a different name."
        )
    return client, str(experiment.experiment_id)


def client_of(uri: str) -> "MlflowClient":
    """A client for the server. Only ``connect`` may create a local database."""
    from mlflow import MlflowClient

    for name, value in REQUEST.items():
        os.environ.setdefault(name, value)
    if without_keys(uri) != uri:  # otherwise, MLflow prints the address with its password when a run ends
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    return MlflowClient(uri)


def is_refusal(error: Exception, *, at_start: bool = False) -> bool:
    """Whether the server will always refuse the request, so that a retry is pointless.

    With ``at_start``, ``START_REFUSALS`` also count as refusals.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return str(error.error_code) in (REFUSALS | START_REFUSALS if at_start else REFUSALS)
    if isinstance(error, OSError):  # some errors of the requests package are also ValueErrors
        return False
    return isinstance(error, DeletedExperimentError | KeyError | TypeError | ValueError)


def local_folder() -> Path:
    """The folder on this machine for waiting log entries: in the cache, or in ~/.cache if the cache is on S3."""
    folder = Path(cache_folder("tracking"))
    if "://" in cache_folder():
        folder = Path.home() / ".cache" / "distillkac" / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_name_of(uri: str) -> str:
    """A file name that is unique to the server."""
    return hashlib.sha256(without_keys(uri).encode()).hexdigest()[:16]


@contextmanager
def _locked(uri: str) -> Iterator[None]:
    """Lock a SQLite database, and create it if it does not exist. MLflow fails if two processes create it at once."""
    if not uri.startswith("sqlite:"):
        yield
        return
    with (local_folder() / f"{file_name_of(uri)}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = database_file(uri)
        if path is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"{path.name}.{os.getpid()}.new")  # no process must see a half-created database
            fresh.unlink(missing_ok=True)
            client_of(f"sqlite:///{fresh}").search_experiments(max_results=1)
            fresh.replace(path)
        yield
