"""Whose runs these are, and the end of those whose process has died: MLflow would show them as RUNNING for ever."""

import functools
import os
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.tracking.server import connect

HOST_TAG, PID_TAG, STARTED_TAG = "distillkac.host", "distillkac.pid", "distillkac.process_started"

MANY = 1000
"""Runs a page of MLflow's search."""


@functools.cache
def _started(pid: int) -> str:
    import psutil

    return f"{psutil.Process(pid).create_time():.2f}"


def tags() -> dict[str, str]:
    """Of the runs of this process: ids of processes are used again, so its start belongs to it."""
    return {HOST_TAG: socket.gethostname(), PID_TAG: str(os.getpid()), STARTED_TAG: _started(os.getpid())}


def is_dead(run: Any) -> bool:
    """Whether the run is RUNNING in MLflow, but its process on this host is gone."""
    tags: dict[str, str] = run.data.tags
    if run.info.status != "RUNNING" or tags.get(HOST_TAG) != socket.gethostname() or PID_TAG not in tags:
        return False
    return _is_gone(tags)


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process with these ``tags`` is on this host and has not ended."""
    return tags[HOST_TAG] == socket.gethostname() and not _is_gone(tags)


def _is_gone(tags: Mapping[str, str]) -> bool:
    """Whether no process of this host has the id and the start time in the tags."""
    import psutil

    try:
        process = psutil.Process(int(tags[PID_TAG]))
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return bool(is_zombie or abs(process.create_time() - float(tags[STARTED_TAG])) > 1.0)
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, KeyError, ValueError):
        return False


def close_dead(uri: str, older_than: float | None = None) -> list[str]:
    """End runs as KILLED whose process on this host is gone; returns their ids.

    Args:
        older_than: runs of other hosts too, if nothing was logged to them for so many hours.

    Raises:
        Exception: whatever MLflow raises if the server does not answer.
    """
    client, experiment = connect(uri)
    running = _all(client, experiment, "attributes.status = 'RUNNING'")
    silent = [run for run in running if older_than is not None and _silence(client, run) > older_than]
    return _close(client, [run for run in running if is_dead(run) or (run in silent and not _is_here(run))])


def dead_below(client: Any, experiment: str, run_id: str) -> list[str]:
    """The ids of the runs nested in this one that are RUNNING, but whose process on this host is gone."""
    below = f"attributes.status = 'RUNNING' and tags.mlflow.parentRunId = '{run_id}'"
    return [str(run.info.run_id) for run in _all(client, experiment, below) if is_dead(run)]


def _all(client: Any, experiment: str, which: str) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], which, max_results=MANY, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _close(client: Any, runs: Iterable[Any]) -> list[str]:
    closed = []
    for run in runs:
        client.set_terminated(run.info.run_id, "KILLED")
        closed.append(str(run.info.run_id))
    return closed


def _is_here(run: Any) -> bool:
    return bool(run.data.tags.get(HOST_TAG) == socket.gethostname())


def _silence(client: Any, run: Any) -> float:
    """Hours since the run's start or its last metric, whichever is later."""
    # The newest point of each metric: the ones that are logged all the time tell, and one name is enough of each kind.
    latest = max(
        (
            point.timestamp
            for name in run.data.metrics
            if name in {"loss", "system/cpu_utilization_percentage"}
            for point in client.get_metric_history(run.info.run_id, name)
        ),
        default=run.info.start_time,
    )
    return float(time.time() * 1000 - max(latest, run.info.start_time)) / 3.6e6
