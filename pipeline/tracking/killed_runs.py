"""Mark runs as KILLED: runs stopped from outside, and runs of dead processes, which MLflow shows as RUNNING."""

import time
from typing import Any

from kac.util.errors import DistillKacError, one_line, without_keys
from kac.util.fingerprint import unhashed
from kac.util.log import log
from pipeline.config import Spec
from pipeline.tracking import process_tags
from pipeline.tracking.server import connect, tracking_uri
from pipeline.tracking.tracked_run import TrackedRun

MOST_RUNS = 50_000
"""The maximum number of runs that one MLflow search can return."""


class CloseDeadSpec(Spec):
    """Mark as KILLED each run that MLflow shows as RUNNING although its process on this host has ended."""

    stage = "close-dead"
    older_than: float | None = unhashed(
        None, "also close runs of other hosts that have logged nothing for this many hours", gt=0
    )


def close_dead(spec: CloseDeadSpec) -> list[str]:
    """Close dead runs and return their ids.

    Raises:
        DistillKacError: the tracking server does not answer.
    """
    uri = tracking_uri(".")
    try:
        running = _search(*connect(uri))
        ids = [str(run.info.run_id) for run in running if _is_dead(run) or _is_silent(run, spec.older_than)]
        for run_id in ids:
            mark_killed(TrackedRun(uri, run_id))
        if ids and not TrackedRun(uri, ids[0]).flush():
            raise TimeoutError("the changes are waiting on this disk")
    except Exception as error:
        raise DistillKacError(
            f"The tracking server {without_keys(uri)} does not answer ({one_line(error)}). "
            "Set MLFLOW_TRACKING_URI, or try again later."
        ) from error
    for run_id in ids:
        log.info(f"close-dead: marked run {run_id} as KILLED")
    log.info(f"close-dead: closed {len(ids)} runs of {without_keys(uri)}")
    return ids


def mark_killed(run: TrackedRun) -> None:
    """End a run that was stopped from outside, or whose process has ended."""
    run.end("KILLED")


def dead_below(client: Any, experiment: str, run_id: str) -> list[str]:
    """The ids of a run's nested runs that are RUNNING although their processes on this host have ended."""
    nested = _search(client, experiment, f" and tags.mlflow.parentRunId = '{run_id}'")
    return [str(run.info.run_id) for run in nested if _is_dead(run)]


def _search(client: Any, experiment: str, condition: str = "") -> list[Any]:
    return list(client.search_runs([experiment], f"attributes.status = 'RUNNING'{condition}", max_results=MOST_RUNS))


def _is_dead(run: Any) -> bool:
    return process_tags.is_here(run.data.tags) and process_tags.has_ended(run.data.tags)


def _is_silent(run: Any, hours: float | None) -> bool:
    """Whether a run of another host has logged no metric for this many hours."""
    if hours is None or process_tags.is_here(run.data.tags):
        return False
    last = max([run.info.start_time, *(metric.timestamp for metric in run.data._metric_objs)])
    return float(time.time() * 1000 - last) > hours * 3.6e6
