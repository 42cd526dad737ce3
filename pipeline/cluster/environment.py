"""Addresses and paths in the environment, made absolute in the driver before Ray starts.

Ray's workers inherit the environment of an embedded Ray's driver. Trials and training workers run in directories of
their own, where a relative path names another file.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from kac.util import cache
from kac.util.errors import ArgumentError, DistillKacError, without_keys
from pipeline.cluster import connection as cluster

TRACKING, REGISTRY = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"

PATHS = (
    cache.VARIABLE,
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "RAY_AUTH_TOKEN_PATH",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TORCH_HOME",
)
"""Variables with one path or URI, which this project or the libraries in its workers read."""

SQLITE = re.compile(r"(sqlite(?:\+\w+)?):///([^?]*)(\?.*)?", re.S)
"""The driver, the path of the file, and the options in the address of a SQLite database."""

HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/.*)?")


def make_absolute() -> None:
    """Replace relative paths in this process's environment, and ``~``.

    Raises:
        ArgumentError: a relative path in a submitted job, whose working directory Ray deletes after the job.
    """
    for name in (*PATHS, TRACKING, REGISTRY):
        given = os.environ.get(name, "").strip()
        if not given:
            continue
        try:
            os.environ[name] = _absolute_address(given) if name in {TRACKING, REGISTRY} else _absolute(given)
        except DistillKacError as error:
            raise ArgumentError(f"{name}={given}: {error}") from None


def mlflow_address() -> str:
    """``MLFLOW_TRACKING_URI``, absolute; empty if it is not set.

    Raises:
        ArgumentError: it, or ``MLFLOW_REGISTRY_URI``, is no address that MLflow can use.
    """
    make_absolute()
    for name in (TRACKING, REGISTRY):
        address = os.environ.get(name, "").strip()
        if address and (trouble := _trouble(address)):
            raise ArgumentError(f"{name}={without_keys(address)}: {trouble}")
    return os.environ.get(TRACKING, "").strip()


def database_file(address: str) -> Path | None:
    """The file of a SQLite database; None for another address, or for one that SQLite itself has to read."""
    found = SQLITE.fullmatch(address)
    return Path(found[2]) if found and found[2].startswith("/") else None


def local_path(address: str) -> Path | None:
    """The file or folder of this machine in which an address of MLflow keeps its runs; None for a server."""
    return Path(unquote(address.removeprefix("file://"))) if address.startswith("file:///") else database_file(address)


def _absolute(path: str) -> str:
    made = cluster.absolute(path)
    return made if "://" in made else os.path.normpath(made)


def _absolute_address(address: str) -> str:
    if (found := SQLITE.fullmatch(address)) and _is_file(found[2]):
        return f"{found[1]}:///{_absolute(found[2])}{found[3] or ''}"
    if _allows_folders() and (folder := _folder(address)) is not None:
        return Path(_absolute(folder)).as_uri()
    return address


def _is_file(path: str) -> bool:
    """Whether this is the path of a database: no database in memory, and no URI for SQLite itself."""
    return bool(path) and path != ":memory:" and not path.startswith("file:")


def _folder(address: str) -> str | None:
    """The folder that an address of MLflow names; None for an address of another kind."""
    if address.startswith("file:"):
        return unquote(re.sub(r"^file:(//(localhost(?=/))?)?", "", address))
    is_other = re.match(r"[\w+.-]+:|databricks(-uc)?$", address)
    return None if is_other else address


def _trouble(address: str) -> str | None:
    """What is wrong with an absolute address, and what to write; None: MLflow can use it."""
    if address.lower().startswith("sqlite"):
        return _database_trouble(address)
    if HOST_AND_PORT.fullmatch(address):
        return f"the scheme is missing. Write http://{address}"
    folder = _folder(address)
    if folder is None or _allows_folders():
        return None
    if folder.endswith((".db", ".sqlite", ".sqlite3")):
        return f"this names a folder of runs. For a database write sqlite:///{folder}"
    return (
        "MLflow no longer keeps runs in plain folders. Give a database (sqlite:///mlflow.db) or a server "
        "(http://HOST:5000). To bring the runs of a folder along, see mlflow migrate-filestore"
    )


def _database_trouble(address: str) -> str | None:
    found = SQLITE.fullmatch(address)
    if found is None:
        return "the address of a SQLite database is sqlite:///mlflow.db or sqlite:////absolute/path/mlflow.db"
    driver, path, _ = found.groups()
    if not path or ":memory:" in path:
        return "this database is in memory and ends with its process. Write sqlite:///mlflow.db"
    if path.startswith("file:") and not path.startswith("file:/"):
        return "SQLite would read this relative path itself. Write sqlite:///file:/absolute/path/mlflow.db"
    if path.endswith("/") or Path(path).is_dir():
        return f"this is a folder. Add the name of a file: {driver}:///{path.rstrip('/')}/mlflow.db"
    return None


def _allows_folders() -> bool:
    return os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in {"1", "true"}
