"""Tags that name a process, so that others see whether it has ended."""

import functools
import os
import socket
from collections.abc import Mapping

HOST_TAG, PID_TAG, STARTED_TAG = "distillkac.host", "distillkac.pid", "distillkac.process_started"


def tags() -> dict[str, str]:
    """Tags that identify this process. They include its start time, because process ids are reused."""
    return {HOST_TAG: socket.gethostname(), PID_TAG: str(os.getpid()), STARTED_TAG: _started(os.getpid())}


@functools.cache
def _started(pid: int) -> str:
    import psutil

    return f"{psutil.Process(pid).create_time():.2f}"


def is_here(tags: Mapping[str, str]) -> bool:
    """Whether the process with these ``tags`` is or was on this host."""
    return tags.get(HOST_TAG) == socket.gethostname()


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process with these ``tags`` is running on this host."""
    return is_here(tags) and not has_ended(tags)


def has_ended(tags: Mapping[str, str]) -> bool:
    """Whether no process on this host has the id and the start time of the tags; False if unknown."""
    import psutil

    try:
        process = psutil.Process(int(tags[PID_TAG]))
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return bool(is_zombie or abs(process.create_time() - float(tags[STARTED_TAG])) > 1.0)
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, KeyError, ValueError):
        return False
