"""Make addresses and paths in the environment absolute, before the driver starts Ray.

The workers of an embedded Ray cluster inherit the driver's environment. But trials and training workers run in other
working directories, where a relative path refers to a different file.
"""

import os
import re
from pathlib import Path

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
"""The variables with paths or URIs that this project or its libraries read."""

SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)([^?]*)(\?.*)?", re.S)
"""Matches the driver, path and options in the address of a SQLite database."""


def make_absolute() -> None:
    """Make the paths in this process's environment absolute, and expand ``~``. Raises ``ArgumentError``."""
    for name in (*PATHS, TRACKING, REGISTRY):
        given = os.environ.get(name, "").strip()
        before, path, after = given, "", ""
        match = SQLITE.fullmatch(given)
        if name in PATHS:
            before, path = "", given
        elif match and not match[2].startswith((":memory:", "file:")):  # SQLite itself resolves these
            before, path, after = match.groups("")
        try:
            path = path and cluster.absolute(path)
        except DistillKacError as error:
            raise ArgumentError(f"{name}: {error}") from None
        if given:
            os.environ[name] = before + (os.path.normpath(path) if path.startswith("/") else path) + after


def mlflow_address() -> str:
    """The absolute form of ``MLFLOW_TRACKING_URI``, or an empty string if it is not set.

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
    """The file of a SQLite database, or None for other addresses and for file: URIs, which SQLite itself resolves."""
    match = SQLITE.fullmatch(address)
    return Path(match[2]) if match and match[2].startswith("/") else None


def _address_problem(address: str) -> str | None:
    """What is wrong with an absolute address, and what to write instead, or None if MLflow can use it."""
    if address.lower().startswith("sqlite"):
        match = SQLITE.fullmatch(address)
        path = match[2].removeprefix("file:") if match else ""
        if path.startswith("/") and not path.endswith("/") and not Path(path).is_dir():
            return None
        return "this does not name a SQLite file. Write sqlite:///mlflow.db or sqlite:////absolute/path/mlflow.db"
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", address):
        return f"the scheme is missing. Write http://{address}"
    if address.startswith("file:") or not re.match(r"[\w+.-]+:|databricks(-uc)?$", address):
        return (
            "MLflow no longer stores runs in folders. Use a database (sqlite:///mlflow.db) or a server "
            "(http://HOST:5000). To move the runs of a folder, use mlflow migrate-filestore"
        )
    return None
