"""Computes chunks of samples and features in this process or on Ray actors.

Chunks are small and go to the cache, where a rerun finds them. If an actor is lost, another one computes its chunk: see
``pool.py``.
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
from pipeline.cluster.placement import choose_actors, wait_for_capacity
from pipeline.config import EvaluateSpec
from pipeline.evaluate.pool import each_once
from pipeline.evaluate.sources import Chunk, make
from pipeline.progress import ProgressBar


def make_chunks(spec: EvaluateSpec, data: DataConfig, spaces: Sequence[FeatureSpace], todo: Sequence[Chunk]) -> None:
    """Compute the samples and features of the chunks ``todo`` into the cache.

    Raises:
        DistillKacError: a model gives values that are not finite, an actor sees another cache, or Ray fails.
    """
    if not todo:
        return
    expected = [space.fingerprint for space in spaces]
    finished_rows = _in_process(spec, data, todo) if spec.actors == 0 else _on_actors(spec, data, expected, todo)
    with ProgressBar("evaluate", sum(len(chunk.ids) for chunk in todo), "images") as bar, closing(finished_rows):
        for rows in finished_rows:
            bar.update(rows)


class ChunkActor:
    """Opens the feature spaces once, then computes one chunk per call."""

    def __init__(self, names: Sequence[str], data: DataConfig, expected: Sequence[str]) -> None:
        self.spaces = open_spaces(names, data)
        if [space.fingerprint for space in self.spaces] != list(expected):
            raise DistillKacError(
                "This actor's feature networks differ from the job's. On several nodes DISTILLKAC_CACHE must be a "
                "folder that all nodes share, or an s3:// prefix."
            )

    def make(self, chunk: Chunk) -> int:
        """Compute a chunk; returns its number of rows."""
        make(chunk, self.spaces)
        return len(chunk.ids)


def open_spaces(names: Sequence[str], data: DataConfig) -> list[FeatureSpace]:
    """Open the feature spaces on this process's device."""
    dataset, device = open_dataset(data), default_device()
    return [open_space(name, dataset, device) for name in names]


def task_error(error: Any) -> DistillKacError:
    """The ``DistillKacError`` inside a ``RayTaskError``, or one that describes its cause."""
    return error.cause if isinstance(error.cause, DistillKacError) else DistillKacError(one_line(error.cause))


def _in_process(spec: EvaluateSpec, data: DataConfig, todo: Sequence[Chunk]) -> Generator[int]:
    spaces = open_spaces(spec.features, data)
    for chunk in todo:
        make(chunk, spaces)
        yield len(chunk.ids)


def _on_actors(spec: EvaluateSpec, data: DataConfig, expected: Sequence[str], todo: Sequence[Chunk]) -> Generator[int]:
    import ray

    group = choose_actors(spec).for_work(len(todo))
    wait_for_capacity("evaluate", "`actors`", group.actors, group.resources)
    actor: Any = ray.remote(ChunkActor).options(**group.resources.remote_options)
    try:
        yield from each_once(lambda: actor.remote(spec.features, data, expected), most(group.actors), todo)
    except ray.exceptions.RayTaskError as error:
        raise task_error(error) from None
    except ray.exceptions.RayError as error:
        raise DistillKacError(f"The actors of the evaluation failed in Ray: {cluster.innermost(error)}") from None
