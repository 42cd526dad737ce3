"""The process of a run, and closing runs of dead processes, which MLflow would otherwise show as RUNNING forever."""

import functools
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from pipeline.tracking.server import connect

HOST_TAG, PID_TAG, STARTED_TAG = "distillkac.host", "distillkac.pid", "distillkac.process_started"

PAGE_SIZE = 1000
"""Runs per page of MLflow's search."""


@functools.cache
def _started(pid: int) -> str:
    import psutil

    return f"{psutil.Process(pid).create_time():.2f}"


def tags() -> dict[str, str]:
    """Tags that identify this process. They include its start time, because process ids are reused."""
    return {HOST_TAG: socket.gethostname(), PID_TAG: str(os.getpid()), STARTED_TAG: _started(os.getpid())}


def is_dead(run: Any) -> bool:
    """Whether the run is RUNNING in MLflow, although its process on this host has ended."""
    tags: dict[str, str] = run.data.tags
    if run.info.status != "RUNNING" or tags.get(HOST_TAG) != socket.gethostname() or PID_TAG not in tags:
        return False
    return _is_gone(tags)


def is_alive(tags: Mapping[str, str]) -> bool:
    """Whether the process with these ``tags`` is running on this host."""
    return tags[HOST_TAG] == socket.gethostname() and not _is_gone(tags)


def _is_gone(tags: Mapping[str, str]) -> bool:
    """Whether no process on this host has the id and the start time of the tags."""
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
    """Mark runs as KILLED whose process on this host has ended; returns their ids.

    Args:
        uri: address of the tracking server.
        older_than: also mark runs of other hosts that have logged nothing for this number of hours.

    Raises:
        Exception: any error of MLflow, for example if the server does not answer.
    """
    client, experiment = connect(uri)
    closed = []
    for run in _search(client, experiment, "attributes.status = 'RUNNING'"):
        is_here = run.data.tags.get(HOST_TAG) == socket.gethostname()
        is_old = older_than is not None and not is_here and _hours_silent(client, run) > older_than
        if is_dead(run) or is_old:
            client.set_terminated(run.info.run_id, "KILLED")
            closed.append(str(run.info.run_id))
    return closed


def dead_below(client: Any, experiment: str, run_id: str) -> list[str]:
    """The ids of nested runs that are RUNNING although their process on this host has ended."""
    query = f"attributes.status = 'RUNNING' and tags.mlflow.parentRunId = '{run_id}'"
    return [str(run.info.run_id) for run in _search(client, experiment, query) if is_dead(run)]


def _search(client: Any, experiment: str, query: str) -> list[Any]:
    """All runs that match, from every page of MLflow's search."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], query, max_results=PAGE_SIZE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _hours_silent(client: Any, run: Any) -> float:
    """Hours since the run's last metric, or since its start if it has none."""
    # Two metrics that running stages log all the time are enough.
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
