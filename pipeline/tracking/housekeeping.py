"""The commands of ``python -m jobs.runs``: close dead runs, and deliver waiting log entries."""

from kac.util.errors import DistillKacError, one_line
from kac.util.fingerprint import unhashed
from kac.util.log import log
from pipeline import tracking
from pipeline.config import Spec
from pipeline.tracking.server import without_password


class CloseDeadSpec(Spec):
    """Mark runs as KILLED that MLflow shows as RUNNING, although their process on this host has ended."""

    stage = "close-dead"
    older_than: float | None = unhashed(
        None, "also close runs of other hosts that have logged nothing for this many hours", gt=0
    )


class SyncSpec(Spec):
    """Deliver log entries that ended jobs on this machine could not send to their tracking server."""

    stage = "sync"


def close_dead(spec: CloseDeadSpec) -> list[str]:
    """Close dead runs; returns their ids.

    Raises:
        DistillKacError: the tracking server does not answer.
    """
    uri = tracking.tracking_uri(".")
    try:
        closed = tracking.close_dead(uri, spec.older_than)
    except Exception as error:
        raise DistillKacError(
            f"The tracking server {without_password(uri)} does not answer ({one_line(error)}). "
            "Set MLFLOW_TRACKING_URI, or try again later."
        ) from error
    for run_id in closed:
        log.info(f"close-dead: marked run {run_id} as KILLED")
    log.info(f"close-dead: closed {len(closed)} runs of {without_password(uri)}")
    return closed


def sync(spec: SyncSpec | None = None) -> None:
    """Deliver all log entries that wait on this machine, to every server.

    Raises:
        DistillKacError: some entries could not be delivered.
    """
    delivered, waiting = tracking.sync(tracking.tracking_uri("."))
    log.info(f"sync: delivered {delivered:,} entries")
    if waiting:
        raise DistillKacError(
            f"{waiting:,} log entries still wait, because their tracking servers do not answer. Try again later."
        )
