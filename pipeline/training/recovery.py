"""A training on Ray Train's workers outlives them: it goes on from its last checkpoint, as often as it gets ahead.

Ray Train (2.60) can start a group again by itself. Here every failure ends its ``fit`` and another one begins, because
- it counts failures over the whole training, which over days on nodes that come and go are soon too many; here they
  count only as long as there is no new checkpoint;
- what is left of an elastic group that has lost too much it lets wait for nodes in silence and for ever; here it is
  said, the autoscaler is told, and it ends;
- an elastic group that asks for what other work holds ends; here it begins smaller;
- a lost worker costs two hundred lines of tracebacks of all the others; here it is one line, and a bug that ends the
  training shows its traceback once.
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
from pipeline.cluster import placement
from pipeline.cluster.placement import Share
from pipeline.outputs import STATE_FILE, TRAINING_FOLDER

MAX_FAILURES = 3
"""A worker group that fails more often without getting ahead is a fault to be seen, not to be retried."""

WAIT_SECONDS = 1200.0
"""How long a group waits for nodes in the place of lost ones: an autoscaler brings them in minutes or not at all."""

SAY_SECONDS = 60.0
"""Between two lines about it."""

NOTICE_SECONDS = 30.0
"""Ray takes up to this long to see that a node is gone."""


def fit(make_trainer: Callable[[int | Range], Any], title: str, out: str, workers: int | Range, share: Share) -> Any:
    """The result of a trainer's ``fit``; while there are new checkpoints a failed one is made and fitted anew.

    Args:
        make_trainer: of Ray Train, for so many workers; it goes on from the last checkpoint below ``out``, and starts
            its workers once.
        workers: that are to share the work. share: what each takes of a node.

    Raises:
        DistillKacError: the workers fail again and again at one place, or there is no room for them.
    """
    from ray.train import TrainingFailedError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    failures, group = 0, workers
    while True:
        _await_nodes(title, out, workers, share)
        before = _checkpoints(out)
        try:
            return make_trainer(group).fit()
        except TrainingFailedError as error:
            if _checkpoints(out) != before:
                failures = 0
            has_no_room = isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)
            group = _fitting(workers, share) if has_no_room else workers
            if has_no_room and _others_hold_it(workers, share):
                log.info(f"{title}: waits until other work on the cluster leaves room for {_told(workers, share)}")
                continue
            failures += 1
            _check_hope(error, out, failures)
            log.info(f"{title}: {_what_failed(error)}: going on from the last checkpoint")
            if isinstance(workers, Range) and _lost_ranks(error):
                # An elastic group that begins with a node which is about to be found dead waits for ever.
                time.sleep(NOTICE_SECONDS)
        except Exception as error:
            raise DistillKacError(f"{out}: training failed: {cluster.innermost(error)}") from error


def _check_hope(error: Exception, out: str, failures: int) -> None:
    """Raise what ends the training, if another attempt is not worth it; a bug shows its traceback whole.

    Args:
        failures: since the last new checkpoint.
    """
    told = [each for each in _raised(error) if isinstance(each, DistillKacError)]
    if failures <= MAX_FAILURES and not told:  # what a worker tells people, it would tell again
        return
    if _raised(error) and not told:
        log.warning(error)
    kind = DivergedError if any(isinstance(each, DivergedError) for each in told) else DistillKacError
    raise kind(f"{out}: training failed: {told[0] if told else cluster.innermost(error)}") from error


def _await_nodes(title: str, out: str, workers: int | Range, share: Share) -> None:
    """Return once the nodes have room for the workers; if other work holds it now, Ray Train waits for that.

    Raises:
        DistillKacError: no such room for ``WAIT_SECONDS``, or on the one machine of an embedded Ray.
    """
    wanted, started = least(workers), time.monotonic()
    if placement.room(placement.alive(), share) >= wanted:
        return
    said = -SAY_SECONDS
    with placement.asking(wanted, share):
        while placement.room(placement.alive(), share) < wanted:
            waited = time.monotonic() - started
            if waited >= WAIT_SECONDS or placement.is_embedded():
                raise DistillKacError(
                    f"{out}: expected room for {_told(workers, share)}, found too little for {duration(waited)}: add "
                    "nodes or lower `workers`, and run the same command again to go on from the last checkpoint"
                )
            if waited >= said + SAY_SECONDS:
                said, left = waited, duration(WAIT_SECONDS - waited)
                log.info(f"{title}: no room for {_told(workers, share)}: waiting for nodes, for {left} at most")
            time.sleep(placement.POLL_SECONDS)


def _others_hold_it(workers: int | Range, share: Share) -> bool:
    """Whether other work of the cluster holds the room; the Ray of this process alone has none that would end."""
    return not placement.is_embedded() and placement.room(placement.free(), share) < least(workers)


def _fitting(workers: int | Range, share: Share) -> int | Range:
    """A range with no more workers than other work leaves room for."""
    if not isinstance(workers, Range):
        return workers
    free = placement.room(placement.free(), share)
    return Range(workers.least, int(max(workers.least, min(workers.most, free))))


def _told(workers: int | Range, share: Share) -> str:
    return f"{least(workers)} x ({share})"


def _lost_ranks(error: Exception) -> list[int]:
    """The workers that are gone: where one is, the others fail because they do not reach it."""
    failed = getattr(error, "worker_failures", {})
    return sorted(rank for rank, each in failed.items() if not hasattr(each, "_base_exc"))


def _what_failed(error: Exception) -> str:
    """In one line."""
    failed = getattr(error, "worker_failures", {})
    if not failed:
        return cluster.innermost(error)
    if lost := _lost_ranks(error):
        return f"lost the worker{'s' * (len(lost) > 1)} of rank {', '.join(map(str, lost))}"
    first = min(failed)
    return f"the worker of rank {first} failed ({cluster.innermost(failed[first])})"


def _raised(error: Exception) -> list[BaseException]:
    """What the training loop raised in the workers."""
    failed = getattr(error, "worker_failures", {})
    return [each._base_exc for each in failed.values() if hasattr(each, "_base_exc")]


def _checkpoints(out: str) -> set[str]:
    names = files.list_sizes(files.join(out, TRAINING_FOLDER))
    return {name for name in names if name.rsplit("/", 1)[-1] == STATE_FILE}
