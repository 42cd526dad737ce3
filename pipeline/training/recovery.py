"""A training on Ray Train's workers outlives them: it goes on from its last checkpoint, as often as it gets ahead.

What Ray Train does by itself (2.60), and what is added here:
- A lost worker restarts the whole group from the last checkpoint, ``max_failures`` times in all: over days on nodes
  that come and go that is soon used up. Here it is so many times without a new checkpoint.
- A group for which there is no room any more is waited for in silence and for ever. Here it is said, and it ends.
- A lost worker costs two hundred lines of tracebacks of all the others. Here it is one line; a bug that ends the
  training shows its traceback once.
"""

import sys
from collections.abc import Callable
from time import monotonic as now
from typing import Any

from kac import files
from kac.cost import duration
from kac.errors import DistillKacError
from pipeline import cluster
from pipeline.outputs import STATE_FILE, TRAINING_FOLDER

MAX_FAILURES = 3
"""A worker group that fails more often without getting ahead is a fault to be seen, not to be retried."""

WAIT_SECONDS = 1200.0
"""How long a group waits for nodes in the place of lost ones: an autoscaler brings them in minutes or not at all."""


def fit(make_trainer: Callable[[], Any], title: str, out: str, asked: str) -> Any:
    """The result of a trainer's ``fit``; while there are new checkpoints a failed one is made and fitted anew.

    Args:
        make_trainer: of Ray Train; it goes on from the last checkpoint below ``out``, and starts its workers once.
        asked: the workers, in words.

    Raises:
        DistillKacError: the workers fail again and again at one place, or there is no room for them.
    """
    from ray.train import TrainingFailedError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

    failures = 0
    waiting_since: float | None = None
    while True:
        before = _checkpoints(out)
        try:
            return make_trainer().fit()
        except TrainingFailedError as error:
            why = getattr(error, "controller_failure", error)
            if _checkpoints(out) != before:
                failures, waiting_since = 0, None
            elif not isinstance(why, WorkerGroupStartupTimeoutError):
                failures += 1
            # A group that ran has been started again by Ray Train itself, one that could not start has not.
            if failures > (MAX_FAILURES if isinstance(why, WorkerGroupStartupFailedError) else 0):
                _print_traceback(error)
                raise DistillKacError(f"{out}: training failed: {cluster.innermost(error)}") from error
            if isinstance(why, WorkerGroupStartupTimeoutError):
                waiting_since = waiting_since or now()
                _wait(title, out, asked, now() - waiting_since)
            else:
                print(f"{title}: {cluster.innermost(error)}: going on from the last checkpoint", flush=True)
        except Exception as error:
            raise DistillKacError(f"{out}: training failed: {cluster.innermost(error)}") from error


def _print_traceback(error: Exception) -> None:
    """What a bug in a worker raised there, whole; of an error for people its line will do."""
    raised = [getattr(each, "_base_exc", None) for each in getattr(error, "worker_failures", {}).values()]
    if any(raised) and not any(isinstance(each, DistillKacError) for each in raised):
        print(error, file=sys.stderr, flush=True)


def _wait(title: str, out: str, asked: str, waited: float) -> None:
    if waited >= WAIT_SECONDS:
        raise DistillKacError(
            f"{out}: expected room for {asked}, found too little for {duration(waited)}: add nodes or lower --workers, "
            "and run the same command again to go on from the last checkpoint"
        )
    left = duration(WAIT_SECONDS - waited)
    print(f"{title}: no room for {asked}: waiting for nodes, for {left} at most", flush=True)


def say_what_is_lost(title: str) -> Any:
    """A callback of Ray Train that says that workers were lost, where it would restart the group in silence."""
    from ray.train import UserCallback

    class SayWhatIsLost(UserCallback):  # type: ignore[misc]
        """Called in the process of Ray Train's controller."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            """Some workers have failed."""
            # Where a worker is lost, the others fail because they do not reach it.
            lost = sorted(rank for rank, error in worker_exceptions.items() if not hasattr(error, "_base_exc"))
            first = min(worker_exceptions)
            what = (
                f"lost the worker{'s' * (len(lost) > 1)} of rank {', '.join(map(str, lost))}"
                if lost
                else f"the worker of rank {first} failed ({cluster.innermost(worker_exceptions[first])})"
            )
            print(f"{title}: {what}: all start again from the last checkpoint", flush=True)

    return SayWhatIsLost()


def _checkpoints(out: str) -> set[str]:
    names = files.list_sizes(files.join(out, TRAINING_FOLDER))
    return {name for name in names if name.rsplit("/", 1)[-1] == STATE_FILE}
