"""Restarts training on Ray Train workers from the last checkpoint, as long as it makes progress.

Ray Train (2.60) can restart a worker group itself. Here each failure ends ``fit``, and a new trainer starts, because
- Ray Train counts failures over the whole run, and days on unreliable nodes exceed any limit. Here the count
  restarts at every new checkpoint.
- Ray Train waits silently and forever if an elastic group loses more nodes than it can spare. Here the wait is logged,
  reported to the autoscaler and limited.
- Ray Train fails if an elastic group requests resources that other jobs use. Here a smaller group starts.
- Ray Train prints two hundred lines of tracebacks for a lost worker. Here it is one line, and only a bug that ends the
  run shows its traceback, once.
"""

import time
from collections.abc import Callable
from typing import Any

from kac.networks.cost import duration
from kac.util import files
from kac.util.errors import DistillKacError, DivergedError
from kac.util.log import log
from kac.util.options import Range, least
from pipeline.cluster import connection as cluster
from pipeline.cluster import placement, ray_internals
from pipeline.cluster.placement import Resources
from pipeline.outputs import STATE_FILE, TRAINING_FOLDER

MAX_FAILURES = 3
"""Training stops with an error after more failures than this without a new checkpoint."""

WAIT_SECONDS = 1200.0
"""How long to wait for nodes that replace lost ones. An autoscaler starts them within minutes or not at all."""

LOG_SECONDS = 60.0
"""Time between two log lines about the wait."""

DETECTION_SECONDS = 30.0
"""Ray needs up to this long to detect that a node is lost."""


def fit(
    make_trainer: Callable[[int | Range], Any], title: str, out: str, workers: int | Range, resources: Resources
) -> Any:
    """Fit a trainer of Ray Train, with a new trainer after each failure. Return the result of the last one.

    Args:
        make_trainer: makes a trainer for a number of workers. It resumes from the last checkpoint below ``out`` and
            does not restart its workers.
        resources: resources per worker.

    Raises:
        DistillKacError: the workers fail repeatedly without a new checkpoint, or the cluster cannot fit them.
    """
    from ray.train import TrainingFailedError

    failures, group = 0, workers
    while True:
        _await_nodes(title, out, workers, resources)
        before = _checkpoints(out)
        try:
            return make_trainer(group).fit()
        except TrainingFailedError as error:
            if _checkpoints(out) != before:
                failures = 0
            failure = getattr(error, "controller_failure", None)
            lacks_resources = isinstance(failure, ray_internals.start_timeout_error())
            group = _fitting(workers, resources) if lacks_resources else workers
            if lacks_resources and _are_resources_in_use(workers, resources):
                log.info(
                    f"{title}: waiting until other jobs on the cluster free {_describe_resources(workers, resources)}"
                )
                continue
            failures += 1
            _check_retry(error, out, failures)
            log.info(f"{title}: {_describe_failure(error)}; resuming from the last checkpoint")
            if isinstance(workers, Range) and _lost_ranks(error):
                # An elastic group waits forever if it starts with a dead node that Ray has not detected yet.
                time.sleep(DETECTION_SECONDS)
        except Exception as error:
            raise DistillKacError(f"{out}: training failed: {cluster.innermost(error)}") from error


def _check_retry(error: Exception, out: str, failures: int) -> None:
    """Raise a ``DistillKacError`` if another attempt is pointless. For a bug, log the whole traceback first.

    Args:
        failures: number of failures since the last new checkpoint.
    """
    worker_errors = _worker_errors(error)
    refusals = [each for each in worker_errors if isinstance(each, DistillKacError)]
    if failures <= MAX_FAILURES and not refusals:  # a refusal would only repeat itself
        return
    if worker_errors and not refusals:
        log.warning(error)
    kind = DivergedError if any(isinstance(each, DivergedError) for each in refusals) else DistillKacError
    raise kind(f"{out}: training failed: {refusals[0] if refusals else cluster.innermost(error)}") from error


def _await_nodes(title: str, out: str, workers: int | Range, resources: Resources) -> None:
    """Wait until the nodes can fit the workers. Ray Train itself waits for resources that other jobs use.

    Raises:
        DistillKacError: there were too few nodes for ``WAIT_SECONDS``, or an embedded Ray is too small.
    """
    wanted, started = least(workers), time.monotonic()
    if placement.capacity(resources) >= wanted:
        return
    logged = -LOG_SECONDS
    with placement.requested_from_autoscaler(wanted, resources):
        while placement.capacity(resources) < wanted:
            waited = time.monotonic() - started
            if waited >= WAIT_SECONDS or ray_internals.is_embedded():
                raise DistillKacError(
                    f"{out}: the nodes cannot fit {_describe_resources(workers, resources)}, after waiting for "
                    f"{duration(waited)}. Add nodes or lower `workers`, then run the same command again to resume from "
                    "the last checkpoint."
                )
            if waited >= logged + LOG_SECONDS:
                logged, left = waited, duration(WAIT_SECONDS - waited)
                needed = _describe_resources(workers, resources)
                log.info(f"{title}: the nodes cannot fit {needed}; waiting at most {left} for more nodes")
            time.sleep(placement.POLL_SECONDS)


def _are_resources_in_use(workers: int | Range, resources: Resources) -> bool:
    """Whether other jobs on the cluster use the resources. An embedded Ray has no other jobs."""
    return not ray_internals.is_embedded() and placement.free_capacity(resources) < least(workers)


def _fitting(workers: int | Range, resources: Resources) -> int | Range:
    """A range without the workers that do not fit beside other jobs; a fixed number is unchanged."""
    if not isinstance(workers, Range):
        return workers
    free = placement.free_capacity(resources)
    return Range(workers.least, int(max(workers.least, min(workers.most, free))))


def _describe_resources(workers: int | Range, resources: Resources) -> str:
    return f"{least(workers)} x ({resources})"


def _lost_ranks(error: Exception) -> list[int]:
    """The ranks of lost workers. The other workers fail only because they cannot reach the lost ones."""
    failed = getattr(error, "worker_failures", {})
    return sorted(rank for rank, each in failed.items() if not hasattr(each, "_base_exc"))


def _describe_failure(error: Exception) -> str:
    """What failed, in one line."""
    failed = getattr(error, "worker_failures", {})
    if not failed:
        return cluster.innermost(error)
    if lost := _lost_ranks(error):
        return f"lost the worker{'s' * (len(lost) > 1)} of rank {', '.join(map(str, lost))}"
    first = min(failed)
    return f"the worker of rank {first} failed ({cluster.innermost(failed[first])})"


def _worker_errors(error: Exception) -> list[BaseException]:
    """The exceptions that the training loop raised in the workers."""
    failed = getattr(error, "worker_failures", {})
    return [each._base_exc for each in failed.values() if hasattr(each, "_base_exc")]


def _checkpoints(out: str) -> set[str]:
    names = files.list_sizes(files.join(out, TRAINING_FOLDER))
    return {name for name in names if name.rsplit("/", 1)[-1] == STATE_FILE}
