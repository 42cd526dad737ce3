"""Where the inputs and outputs of a stage lie: asked before its work begins.

A path of one machine's disk means another file, or none, on the next machine. ``check_shared`` refuses such paths where
the work may run on several; folders that all machines see are named in ``DISTILLKAC_SHARED_FOLDERS``.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping

from pydantic import BaseModel

from kac.util import cache, files, probes
from kac.util.errors import ArgumentError, DistillKacError
from kac.util.options import flatten
from pipeline import tracking
from pipeline.cluster import connection as cluster
from pipeline.cluster import environment, joining

SHARED_VARIABLE = "DISTILLKAC_SHARED_FOLDERS"
"""Folders that every machine of the cluster sees under the same name: ``/mnt/efs:/home``."""


def check_answers(options: BaseModel) -> None:
    """Look at every bucket that the options name, and at that of the cache, for ``probes.PROBE_SECONDS`` at most.

    Raises:
        DistillKacError: S3 does not let us look at one, or does not answer.
    """
    values = flatten(options.model_dump(mode="json"))
    texts = [text for value in values.values() for text in (value if isinstance(value, list) else [value])]
    paths = [text for text in [*texts, cache.cache_folder()] if isinstance(text, str) and text.startswith("s3://")]
    for path in {path.split("/")[2]: path for path in reversed(paths)}.values():
        probes.check_answers(path)


def check_shared(
    paths: Mapping[str, str | Iterable[str] | None], is_spread: Callable[[], bool], writes_to_mlflow: str | None = None
) -> None:
    """Refuse paths that only one of the cluster's machines sees.

    An embedded Ray is one machine: nothing is asked of it.

    Args:
        paths: by the options that give them; None: not used.
        is_spread: whether the work goes to Ray's workers, rather than to this process alone.
        writes_to_mlflow: the output of a stage whose workers log to MLflow themselves.

    Raises:
        DistillKacError: the first such path, or no cluster takes this process.
    """
    if not os.environ.get(joining.VARIABLE) and not cluster.is_connected():
        return
    if cluster.is_worker():  # its driver has asked, whose environment says what is shared
        return
    if not is_spread():
        return
    machines = cluster.machines()
    if machines.are_one:
        return
    for option, path in _each(paths):
        if not is_shared(path):
            raise ArgumentError(
                f"{option}: expected s3:// or a folder that every machine sees, since the cluster has {machines}, "
                f"found {path}: use s3://, or name the folders that they share in {SHARED_VARIABLE}=/mnt/one:/mnt/other"
            )
    uri = "" if writes_to_mlflow is None else tracking.tracking_uri(writes_to_mlflow)
    local = environment.local_path(uri)
    if local and not is_shared(str(local)):
        raise DistillKacError(
            f"MLFLOW_TRACKING_URI: expected a tracking server, since the cluster has {machines}, found {uri}, a file "
            "of this one: start mlflow server, and set it to http://HOST:5000"
        )


def _each(paths: Mapping[str, str | Iterable[str] | None]) -> Iterator[tuple[str, str]]:
    for option, given in paths.items():
        for path in [given] if isinstance(given, str) else given or []:
            yield option, path


def cache_of(is_used: bool = True) -> dict[str, str]:
    """The cache as one of ``check_shared``'s paths, where machines must find in it what others have put there."""
    return {cache.VARIABLE: cache.cache_folder()} if is_used else {}


def is_shared(path: str) -> bool:
    """Whether every machine sees what is there, as far as the path and ``DISTILLKAC_SHARED_FOLDERS`` say."""
    if files.is_uri(path):
        return True
    local = os.path.abspath(files.locate(path).path)
    return any(_is_below(local, folder) for folder in _shared_folders())


def _shared_folders() -> Iterable[str]:
    folders = [os.path.expanduser(folder) for folder in os.environ.get(SHARED_VARIABLE, "").split(":") if folder]
    wrong = next((folder for folder in folders if not os.path.isabs(folder)), None)
    if wrong is not None:
        raise ArgumentError(f"{SHARED_VARIABLE}: expected absolute folders with colons between, found {wrong}")
    return [os.path.normpath(folder) for folder in folders]


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
