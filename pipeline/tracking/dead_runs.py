"""Close the runs of dead processes, which MLflow would otherwise show as RUNNING forever."""

import time
from typing import Any

from kac.util.errors import DistillKacError, one_line
from kac.util.fingerprint import unhashed
from kac.util.log import log
from pipeline.config import Spec
from pipeline.tracking import process_tags
from pipeline.tracking.server import connect, tracking_uri, without_password
from pipeline.tracking.tracked_run import TrackedRun

PAGE_SIZE = 1000
"""Runs per page of MLflow's search."""


class CloseDeadSpec(Spec):
    """Mark runs as KILLED that MLflow shows as RUNNING, although their process on this host has ended."""

    stage = "close-dead"
    older_than: float | None = unhashed(
        None, "also close runs of other hosts that have logged nothing for this many hours", gt=0
    )


def close_dead(spec: CloseDeadSpec) -> list[str]:
    """Close dead runs; returns their ids.

    Raises:
        DistillKacError: the tracking server does not answer.
    """
    uri = tracking_uri(".")
    try:
        runs = _dead_runs(uri, spec.older_than)
        for run in runs:
            run.end_killed()
        if runs and not runs[0].flush():
            raise TimeoutError("the changes wait on this disk")
    except Exception as error:
        raise DistillKacError(
            f"The tracking server {without_password(uri)} does not answer ({one_line(error)}). "
            "Set MLFLOW_TRACKING_URI, or try again later."
        ) from error
    for run in runs:
        log.info(f"close-dead: marked run {run.run_id} as KILLED")
    log.info(f"close-dead: closed {len(runs)} runs of {without_password(uri)}")
    return [run.run_id for run in runs]


def dead_below(client: Any, experiment: str, run: TrackedRun) -> list[TrackedRun]:
    """The nested runs of a run that are RUNNING although their process on this host has ended."""
    nested = _search(client, experiment, f" and tags.mlflow.parentRunId = '{run.run_id}'")
    return [TrackedRun(run.tracking_uri, str(other.info.run_id)) for other in nested if _is_dead(other)]


def _dead_runs(uri: str, older_than: float | None) -> list[TrackedRun]:
    client, experiment = connect(uri)

    def is_old(run: Any) -> bool:
        if older_than is None or process_tags.is_here(run.data.tags):
            return False
        return _hours_silent(client, run) > older_than

    running = _search(client, experiment)
    return [TrackedRun(uri, str(run.info.run_id)) for run in running if _is_dead(run) or is_old(run)]


def _search(client: Any, experiment: str, condition: str = "") -> list[Any]:
    """All running runs that match, from every page of MLflow's search."""
    query = f"attributes.status = 'RUNNING'{condition}"
    page = client.search_runs([experiment], query, max_results=PAGE_SIZE)
    found = list(page)
    while page.token:
        page = client.search_runs([experiment], query, max_results=PAGE_SIZE, page_token=page.token)
        found += page
    return found


def _is_dead(run: Any) -> bool:
    """Whether a run's process on this host has ended."""
    return process_tags.is_here(run.data.tags) and process_tags.has_ended(run.data.tags)


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
