"""Restart Ray Train workers from the last checkpoint after a failure, as long as training makes progress.

Ray Train (2.60) can restart a worker group itself. Instead, ``fit`` starts a new trainer after each failure, because:
- Ray Train counts failures over the whole run, so days on unreliable nodes exceed any limit. ``fit`` counts only the
  failures since the last new checkpoint.
- Ray Train waits silently and forever if an elastic group loses more nodes than it can spare. ``fit`` limits the wait.
- Ray Train fails if an elastic group requests resources that other jobs use. ``fit`` starts a smaller group.
- Ray Train prints two hundred lines of tracebacks for a lost worker. ``fit`` shows a traceback only for a bug.
"""

import time
from collections.abc import Callable
from typing import Any

from kac.networks.cost import duration
from kac.util import files
from kac.util.errors import DistillKacError, DivergedError, StorageError
from kac.util.log import log
from kac.util.options import Range, least
from pipeline.cluster import connection as cluster
from pipeline.cluster import placement, ray_internals
from pipeline.cluster.placement import Resources
from pipeline.outputs import STATE_FILE, TRAINING_FOLDER

MAX_FAILURES = 3
"""Maximum number of failures without a new checkpoint. One more failure ends training with an error."""

WAIT_SECONDS = 1200.0
"""How long to wait for nodes that replace lost nodes. An autoscaler starts nodes within minutes or not at all."""

DETECTION_SECONDS = 30.0
"""Ray needs up to this long to detect that a node is lost. A draining node leaves the cluster once it is idle."""


class NodeDrainingError(Exception):
    """A worker's node is draining: it is about to leave the cluster. The last update is saved in a checkpoint."""


def fit(
    make_trainer: Callable[[int | Range], Any], title: str, out: str, workers: int | Range, resources: Resources
) -> Any:
    """Fit a Ray Train trainer. After each failure, fit a new trainer. Return the last trainer's result.

    Args:
        make_trainer: makes a trainer for a number of workers. The trainer resumes from the last checkpoint below
            ``out``, and does not restart its workers.
        resources: resources per worker.

    Raises:
        DistillKacError: the workers fail repeatedly without a new checkpoint, or the cluster cannot fit the workers.
    """
    from ray.train import ControllerError, TrainingFailedError

    failures, group = 0, workers
    while True:
        _await_nodes(title, out, least(workers), resources)
        before = _checkpoints(out)
        try:
            return make_trainer(group).fit()
        except TrainingFailedError as error:
            group = workers
            if _checkpoints(out) != before:
                failures = 0
            if isinstance(getattr(error, "controller_failure", None), ray_internals.start_timeout_error()):
                free = placement.free_capacity(resources)
                if isinstance(workers, Range):  # leave out the workers that do not fit alongside other jobs
                    group = Range(workers.least, int(max(workers.least, min(workers.most, free))))
                if free < least(workers) and not ray_internals.is_embedded():  # an embedded cluster runs no other jobs
                    log.info(f"{title}: waiting until other jobs release {least(workers)} x ({resources})")
                    continue
            failures += 1
            _handle_failure(error, title, out, has_tries=failures <= MAX_FAILURES)
            if isinstance(workers, Range) and not isinstance(error, ControllerError):
                # An elastic group waits forever if it starts with a dead node that Ray has not detected yet.
                time.sleep(DETECTION_SECONDS)
        except Exception as error:
            raise DistillKacError(f"{out}: training failed: {cluster.innermost(error)}") from error


def _handle_failure(error: Exception, title: str, out: str, has_tries: bool) -> None:
    """Log the failure of a group in one line.

    Raises:
        DistillKacError: there are no tries left, or the next try would fail in the same way. For a bug, the whole
            traceback is logged first.
    """
    failed: dict[int, Exception] = getattr(error, "worker_failures", {})
    lost = sorted(rank for rank, each in failed.items() if isinstance(each, ray_internals.lost_worker_errors()))
    raised = [each for rank, each in failed.items() if rank not in lost]  # by the training loop
    refusals = [each for each in raised if isinstance(each, DistillKacError) and not isinstance(each, StorageError)]
    if refusals or not has_tries:
        if raised and not refusals:
            log.warning(error)
        kind = DivergedError if any(isinstance(each, DivergedError) for each in refusals) else DistillKacError
        raise kind(f"{out}: training failed: {refusals[0] if refusals else cluster.innermost(error)}") from error
    # The other workers fail only because they cannot reach the lost workers.
    draining = [each for each in raised if isinstance(each, NodeDrainingError)]
    if draining:
        what = str(draining[0])
    elif lost:
        what = f"lost the worker{'s' * (len(lost) > 1)} of rank {', '.join(map(str, lost))}"
    elif failed:
        what = f"the worker of rank {min(failed)} failed ({cluster.innermost(failed[min(failed)])})"
    else:
        what = cluster.innermost(error)
    log.info(f"{title}: {what}; resuming from the last checkpoint")


def _await_nodes(title: str, out: str, wanted: int, resources: Resources) -> None:
    """Wait until the nodes can fit the workers. Ray Train itself waits until other jobs release resources.

    Raises:
        DistillKacError: there were too few nodes for ``WAIT_SECONDS``, or an embedded Ray cluster is too small.
    """
    if placement.capacity(resources) >= wanted:
        return
    problem, started = f"the nodes cannot fit {wanted} x ({resources})", time.monotonic()
    if not ray_internals.is_embedded():
        log.info(f"{title}: {problem}; waiting at most {duration(WAIT_SECONDS)} for more nodes")
    with placement.requested_from_autoscaler(wanted, resources):
        while placement.capacity(resources) < wanted:
            waited = time.monotonic() - started
            if waited >= WAIT_SECONDS or ray_internals.is_embedded():
                raise DistillKacError(
                    f"{out}: {problem}, after waiting for {duration(waited)}. Add nodes or lower `workers`, then run "
                    "the same command again to resume from the last checkpoint."
                )
            time.sleep(placement.POLL_SECONDS)


def _checkpoints(out: str) -> set[str]:
    names = files.list_sizes(files.join(out, TRAINING_FOLDER))
    return {name for name in names if name.rsplit("/", 1)[-1] == STATE_FILE}
