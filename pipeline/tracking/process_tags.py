"""Tags for a run's origin: the process (so that the process's end can be detected), command, commit and user."""

import functools
import getpass
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

HOST_TAG, PID_TAG, STARTED_TAG = "distillkac.host", "distillkac.pid", "distillkac.process_started"
ROOT = Path(__file__).parents[2]


def tags() -> dict[str, str]:
    """Tags that identify this process. They include the process's start time, because process ids are reused."""
    return {HOST_TAG: socket.gethostname(), PID_TAG: str(os.getpid()), STARTED_TAG: _started(os.getpid())}


def is_here(tags: Mapping[str, str]) -> bool:
    """Whether the process with these ``tags`` runs or ran on this host."""
    return tags.get(HOST_TAG) == socket.gethostname()


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process with these ``tags`` is running on this host."""
    return is_here(tags) and not has_ended(tags)


def has_ended(tags: Mapping[str, str]) -> bool:
    """Whether this host's process with these ``tags`` has ended; False if its state is unknown."""
    import psutil

    try:
        process = psutil.Process(int(tags[PID_TAG]))
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return bool(is_zombie or abs(process.create_time() - float(tags[STARTED_TAG])) > 1.0)
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, KeyError, ValueError):
        return False


def source_tags(stage: str) -> dict[str, str]:
    """MLflow's own tags for a run's source, which MLflow's pages show."""
    tags = {
        "mlflow.source.name": f"python -m jobs.{stage}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": _commit(),
        "mlflow.user": _user(),
    }
    return {name: value for name, value in tags.items() if value}


@functools.cache
def _started(pid: int) -> str:
    import psutil

    return f"{psutil.Process(pid).create_time():.2f}"


@functools.cache
def _commit() -> str:
    """The checked-out commit; empty outside of a git checkout."""
    if not (ROOT / ".git").exists():  # otherwise, git would search the parent folders
        return ""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have no name
        return ""
