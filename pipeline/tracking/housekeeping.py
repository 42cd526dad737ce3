"""What ``python -m jobs.runs`` does for the runs in MLflow."""

from kac.util.errors import DistillKacError, one_line
from kac.util.fingerprint import unhashed
from kac.util.log import log
from pipeline import tracking
from pipeline.config.specs import Spec
from pipeline.tracking.server import without_password


class CloseDeadSpec(Spec):
    """End runs as KILLED that MLflow shows as RUNNING, but whose process on this host is gone."""

    stage = "close-dead"
    older_than: float | None = unhashed(
        None, "runs of other hosts too, if nothing was logged to them for so many hours", gt=0
    )


class SyncSpec(Spec):
    """Deliver what jobs that have ended could not deliver to their tracking server."""

    stage = "sync"


def close_dead(spec: CloseDeadSpec) -> list[str]:
    """End them, and return their ids.

    Raises:
        DistillKacError: the server does not answer.
    """
    uri = tracking.tracking_uri(".")
    try:
        closed = tracking.close_dead(uri, spec.older_than)
    except Exception as error:
        raise DistillKacError(
            f"{without_password(uri)}: expected a tracking server that answers, found: {one_line(error)}: "
            "set MLFLOW_TRACKING_URI, or try again later"
        ) from error
    for run_id in closed:
        log.info(f"close-dead: {run_id} is KILLED")
    log.info(f"close-dead: {len(closed)} runs of {without_password(uri)} closed")
    return closed


def sync(spec: SyncSpec | None = None) -> None:
    """Deliver to every server for which something waits on this machine.

    Raises:
        DistillKacError: some still waits.
    """
    delivered, waiting = tracking.sync(tracking.tracking_uri("."))
    log.info(f"sync: {delivered:,} entries delivered")
    if waiting:
        raise DistillKacError(
            f"expected tracking servers that answer, found {waiting:,} entries that still wait: try again later"
        )
