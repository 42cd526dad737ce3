"""Chunks made where there is room: in this process, or on Ray actors as the rollout's.

Plain actors suffice here: a chunk is small, and what is made lies in the cache, where the next run finds it. The chunk
of an actor that is lost is made by another one: see ``pool.py``.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from kac.data import DataConfig, open_dataset
from kac.metrics.features import FeatureSpace, open_space
from kac.util.device import default_device
from kac.util.errors import DistillKacError, one_line
from kac.util.options import most
from pipeline.cluster import connection as cluster
from pipeline.cluster.actor_place import choose_place
from pipeline.cluster.placement import await_room
from pipeline.config.specs import EvaluateSpec
from pipeline.evaluate.pool import each_once
from pipeline.evaluate.sources import Chunk, make
from pipeline.progress import ProgressBar


def make_chunks(spec: EvaluateSpec, data: DataConfig, spaces: Sequence[FeatureSpace], todo: Sequence[Chunk]) -> None:
    """Bring every chunk's samples and features into the cache.

    Raises:
        DistillKacError: a model made values that are not finite, an actor sees another cache, or Ray gave up.
    """
    if not todo:
        return
    expected = [space.fingerprint for space in spaces]
    finished = _here(spec, data, todo) if spec.actors == 0 else _on_actors(spec, data, expected, todo)
    with ProgressBar("evaluate", sum(len(chunk.ids) for chunk in todo), "images") as bar, closing(finished):
        for rows in finished:
            bar.update(rows)


class ChunkActor:
    """Opens the feature spaces once, then makes one chunk a call."""

    def __init__(self, names: Sequence[str], data: DataConfig, expected: Sequence[str]) -> None:
        self.spaces = open_spaces(names, data)
        if [space.fingerprint for space in self.spaces] != list(expected):
            raise DistillKacError(
                "expected the feature networks of the job's own process, found others: on several nodes "
                "DISTILLKAC_CACHE must be a folder that all of them share, or an s3:// prefix"
            )

    def make(self, chunk: Chunk) -> int:
        """Make a chunk; returns its rows."""
        make(chunk, self.spaces)
        return len(chunk.ids)


def open_spaces(names: Sequence[str], data: DataConfig) -> list[FeatureSpace]:
    """The feature spaces, on this process's device."""
    dataset, device = open_dataset(data), default_device()
    return [open_space(name, dataset, device) for name in names]


def task_error(error: Any) -> DistillKacError:
    """The error of this project that a ``RayTaskError`` carries; one line of any other exception."""
    return error.cause if isinstance(error.cause, DistillKacError) else DistillKacError(one_line(error.cause))


def _here(spec: EvaluateSpec, data: DataConfig, todo: Sequence[Chunk]) -> Generator[int]:
    spaces = open_spaces(spec.features, data)
    for chunk in todo:
        make(chunk, spaces)
        yield len(chunk.ids)


def _on_actors(spec: EvaluateSpec, data: DataConfig, expected: Sequence[str], todo: Sequence[Chunk]) -> Generator[int]:
    import ray

    place = choose_place(spec).for_work(len(todo))
    await_room("evaluate", "`actors`", place.actors, place.share)
    actor: Any = ray.remote(ChunkActor).options(**place.share.remote_options)
    try:
        yield from each_once(lambda: actor.remote(spec.features, data, expected), most(place.actors), todo)
    except ray.exceptions.RayTaskError as error:
        raise task_error(error) from None
    except ray.exceptions.RayError as error:
        raise DistillKacError(f"evaluate: the actors failed in Ray: {cluster.innermost(error)}") from None
