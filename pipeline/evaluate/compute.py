"""Tests the feature networks, and computes chunks of samples and features in this process or on Ray actors.

Chunks are small and are stored in the cache, where a rerun finds them. If an actor is lost, the next free actor
computes its chunk, and a new actor starts when a node has the resources.

Ray's ``ActorPool`` with restarts (2.60) is not enough. It sends all retries of a call to the lost actor, and exhausts
them in seconds, before Ray notices that the node is lost. It also assigns work to actors that no node can run yet.
"""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from kac.data import DataConfig, open_dataset
from kac.metrics.features import OWN, FeatureSpace, check_fits, open_space, try_space
from kac.util.device import default_device
from kac.util.errors import DistillKacError, one_line
from kac.util.options import most
from pipeline.cluster import connection as cluster
from pipeline.cluster.placement import choose_actors, hide_unassigned_gpus, wait_for_capacity
from pipeline.config import EvaluateSpec
from pipeline.evaluate.samples import Chunk
from pipeline.progress import ProgressBar

MAX_LOSSES = 3
"""Maximum number of lost actors per item. A pool of N actors may also lose N times this number while actors start."""


def try_features(spec: EvaluateSpec, data: DataConfig) -> None:
    """Check that the feature spaces of an evaluation fit its data, and run the user's networks on a few images.

    The networks run where the evaluation will run them: in this process, or in a Ray task with an actor's
    resources.

    Raises:
        DistillKacError: a space does not fit the data, or a network does not return valid features.
    """
    dataset = open_dataset(data.images)
    for given in spec.features:
        check_fits(given, dataset)
    outside = [given for given in spec.features if given not in OWN]
    if not outside:
        return
    if spec.actors == 0:
        _try_spaces(outside, data)
        return
    import ray

    resources = choose_actors(spec).resources
    wait_for_capacity("evaluate", "`actors`", 1, resources)
    trial = ray.remote(_try_spaces).options(max_retries=0, **resources.remote_options)
    with _ray_errors(f"`features` {', '.join(outside)}: the trial run"):
        ray.get(trial.remote(outside, data))


def _try_spaces(names: Sequence[str], data: DataConfig) -> None:
    for name in names:
        try_space(name, open_dataset(data.images), default_device())


def make_chunks(spec: EvaluateSpec, data: DataConfig, spaces: Sequence[FeatureSpace], todo: Sequence[Chunk]) -> None:
    """Compute chunks into the cache.

    Raises:
        DistillKacError: a model returns values that are not finite, an actor uses a different cache, or Ray fails.
    """
    if not todo:
        return
    with ProgressBar("evaluate", sum(len(chunk.ids) for chunk in todo), "images") as bar:
        if spec.actors == 0:
            for chunk in todo:
                chunk.make(spaces)
                bar.update(len(chunk.ids))
            return
        import ray

        group = choose_actors(spec).for_work(len(todo))
        wait_for_capacity("evaluate", "`actors`", group.actors, group.resources)
        actor: Any = ray.remote(ChunkActor).options(**group.resources.remote_options)
        expected = [space.fingerprint for space in spaces]
        finished_rows = each_once(lambda: actor.remote(spec.features, data, expected), most(group.actors), todo)
        with _ray_errors("The actors of the evaluation"), closing(finished_rows):
            for rows in finished_rows:
                bar.update(rows)


class ChunkActor:
    """An actor that opens the feature spaces once, and then computes one chunk per call."""

    def __init__(self, names: Sequence[str], data: DataConfig, expected: Sequence[str]) -> None:
        hide_unassigned_gpus()
        self.spaces = open_spaces(names, data)
        if [space.fingerprint for space in self.spaces] != list(expected):
            raise DistillKacError(
                "This actor's feature networks differ from the job's. On several nodes, set DISTILLKAC_CACHE to a "
                "folder that all nodes share, or to an s3:// prefix."
            )

    def make(self, chunk: Chunk) -> int:
        """Compute a chunk and return its number of rows."""
        chunk.make(self.spaces)
        return len(chunk.ids)


def open_spaces(names: Sequence[str], data: DataConfig) -> list[FeatureSpace]:
    """Load the feature spaces onto this process's device."""
    return [open_space(name, open_dataset(data.images), default_device()) for name in names]


@contextmanager
def _ray_errors(work: str) -> Iterator[None]:
    """Convert errors of Ray and errors in its tasks to ``DistillKacError``."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause: Any = error.cause
        raise (cause if isinstance(cause, DistillKacError) else DistillKacError(one_line(cause))) from None
    except ray.exceptions.RayError as error:
        raise DistillKacError(f"{work} failed in Ray: {cluster.innermost(error)}") from None


def each_once(start: Callable[[], Any], actors: int, items: Sequence[Any]) -> Generator[Any]:
    """Call ``actor.make(item)`` once per item, and yield the results in the order of completion.

    Args:
        start: starts an actor.
        actors: the number of actors. An actor without work is killed, which frees its resources.

    Raises:
        RayActorError: more actors were lost than ``MAX_LOSSES`` allows.
        RayTaskError: ``make`` raised.
    """
    import ray

    left, losses, done = deque(range(len(items))), Counter[int | None](), 0
    running: dict[Any, tuple[Any, int | None]] = {}  # by call: an actor, and its item (None while it starts)

    def begin() -> None:
        actor = start()
        running[actor.__ray_ready__.remote()] = actor, None

    try:
        for _ in range(actors):
            begin()
        while done < len(items):
            (ended,), _ = ray.wait(list(running), num_returns=1)
            actor, number = running[ended]
            try:
                result = ray.get(ended)
            except ray.exceptions.RayActorError:
                losses[number] += 1
                if losses[number] > MAX_LOSSES * (actors if number is None else 1):
                    raise
                if number is not None:
                    left.appendleft(number)
                del running[ended]
                ray.kill(actor)
                begin()
                continue
            del running[ended]  # after ray.get: if ray.get raises, `finally` kills the actor
            if number is not None:
                done += 1
                losses[None] = 0
                yield result
            if left:
                following = left.popleft()
                running[actor.make.remote(items[following])] = actor, following
            else:
                ray.kill(actor)
    finally:
        for actor, _ in running.values():
            ray.kill(actor)
