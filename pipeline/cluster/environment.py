"""Make addresses and paths in the environment absolute, before the driver starts Ray.

The workers of an embedded Ray inherit the driver's environment. But trials and training workers have other working
directories, where a relative path means another file.
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
"""Variables with a path or URI that this project or its libraries read."""

SQLITE = re.compile(r"(sqlite(?:\+\w+)?):///([^?]*)(\?.*)?", re.S)
"""Driver, path and options in the address of a SQLite database."""

HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/.*)?")


def make_absolute() -> None:
    """Make the paths in this process's environment absolute, and expand ``~``.

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
            raise ArgumentError(f"{name}: {error}") from None


def mlflow_address() -> str:
    """The absolute form of ``MLFLOW_TRACKING_URI``; empty if it is not set.

    Raises:
        ArgumentError: MLflow cannot use ``MLFLOW_TRACKING_URI`` or ``MLFLOW_REGISTRY_URI``.
    """
    make_absolute()
    for name in (TRACKING, REGISTRY):
        address = os.environ.get(name, "").strip()
        if address and (problem := _address_problem(address)):
            raise ArgumentError(f"{name} is {without_keys(address)}: {problem}.")
    return os.environ.get(TRACKING, "").strip()


def database_file(address: str) -> Path | None:
    """The file of a SQLite database; None for other addresses, and for file: URIs, which SQLite itself reads."""
    match = SQLITE.fullmatch(address)
    return Path(match[2]) if match and match[2].startswith("/") else None


def local_path(address: str) -> Path | None:
    """The local file or folder that an MLflow address points to; None for a server."""
    return Path(unquote(address.removeprefix("file://"))) if address.startswith("file:///") else database_file(address)


def _absolute(path: str) -> str:
    name = cluster.absolute(path)
    return name if "://" in name else os.path.normpath(name)


def _absolute_address(address: str) -> str:
    if (match := SQLITE.fullmatch(address)) and _is_file(match[2]):
        return f"{match[1]}:///{_absolute(match[2])}{match[3] or ''}"
    if _allows_folders() and (folder := _folder(address)) is not None:
        return Path(_absolute(folder)).as_uri()
    return address


def _is_file(path: str) -> bool:
    """Whether this is a path, and neither a database in memory nor a file: URI, which SQLite itself reads."""
    return bool(path) and path != ":memory:" and not path.startswith("file:")


def _folder(address: str) -> str | None:
    """The folder of runs that an address of MLflow names; None for other addresses."""
    if address.startswith("file:"):
        return unquote(re.sub(r"^file:(//(localhost(?=/))?)?", "", address))
    is_other = re.match(r"[\w+.-]+:|databricks(-uc)?$", address)
    return None if is_other else address


def _address_problem(address: str) -> str | None:
    """What is wrong with an absolute address, and what to write instead; None if MLflow can use it."""
    if address.lower().startswith("sqlite"):
        return _database_problem(address)
    if HOST_AND_PORT.fullmatch(address):
        return f"the scheme is missing. Write http://{address}"
    folder = _folder(address)
    if folder is None or _allows_folders():
        return None
    if folder.endswith((".db", ".sqlite", ".sqlite3")):
        return f"this is the name of a folder. For a database, write sqlite:///{folder}"
    return (
        "MLflow no longer stores runs in folders. Use a database (sqlite:///mlflow.db) or a server "
        "(http://HOST:5000). To move the runs of a folder, use mlflow migrate-filestore"
    )


def _database_problem(address: str) -> str | None:
    match = SQLITE.fullmatch(address)
    if match is None:
        return "the address of a SQLite database has the form sqlite:///mlflow.db or sqlite:////absolute/path/mlflow.db"
    driver, path, _ = match.groups()
    if not path or ":memory:" in path:
        return "this database is in memory and ends with its process. Write sqlite:///mlflow.db"
    if path.startswith("file:") and not path.startswith("file:/"):
        return "SQLite would read this relative path itself. Write sqlite:///file:/absolute/path/mlflow.db"
    if path.endswith("/") or Path(path).is_dir():
        return f"this is a folder. Add a file name: {driver}:///{path.rstrip('/')}/mlflow.db"
    return None


def _allows_folders() -> bool:
    return os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in {"1", "true"}
