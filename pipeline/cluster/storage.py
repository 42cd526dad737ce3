"""Check the paths of a stage before its work begins.

On a different machine, a local path names a different file or no file. If the work may run on several machines,
``check_shared`` refuses local paths, except in the folders of ``DISTILLKAC_SHARED_FOLDERS``, which all machines share.
"""

import os
from collections.abc import Callable, Iterable, Mapping

from pydantic import BaseModel

from kac.util import cache, files, probes
from kac.util.errors import ArgumentError, DistillKacError
from kac.util.options import flatten
from pipeline import tracking
from pipeline.cluster import connection as cluster
from pipeline.cluster import environment, placement

SHARED_VARIABLE = "DISTILLKAC_SHARED_FOLDERS"
"""Folders that every machine of the cluster has under the same path, separated by colons: ``/mnt/efs:/home``."""


def check_answers(options: BaseModel) -> None:
    """Check that S3 answers within ``probes.PROBE_SECONDS`` for each bucket in the options, and for the cache's bucket.

    Raises:
        DistillKacError: S3 refuses access to a bucket, or does not answer.
    """
    values = flatten(options.model_dump(mode="json")).values()
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    paths = [text for text in [*texts, cache.cache_folder()] if isinstance(text, str) and text.startswith("s3://")]
    for path in {path.split("/")[2]: path for path in reversed(paths)}.values():
        probes.check_answers(path)


def check_shared(
    paths: Mapping[str, str | Iterable[str] | None], is_spread: Callable[[], bool], writes_to_mlflow: str | None = None
) -> None:
    """Check that all machines of the cluster can use the paths. An embedded Ray cluster has only one machine.

    Args:
        paths: maps the name of each argument or variable to its path, or to None if it is unused.
        is_spread: returns whether Ray workers do the work, and not only this process.
        writes_to_mlflow: the output of a stage whose workers log to MLflow, or None if they do not.

    Raises:
        DistillKacError: a path is local to this machine, or this process cannot join the cluster.
    """
    if not os.environ.get(cluster.RAY_ADDRESS) and not cluster.is_connected():
        return
    # A worker's driver has already checked the paths. Only the driver's environment names the shared folders.
    if cluster.is_worker() or not is_spread():
        return
    machines = placement.several_machines()
    if not machines:
        return
    for option, given in paths.items():
        for path in [given] if isinstance(given, str) else given or []:
            if not is_shared(path):
                raise ArgumentError(
                    f"{option} is {path} on this machine, but the cluster has {machines}. Use s3://, or name folders "
                    f"that all machines share in {SHARED_VARIABLE}=/mnt/one:/mnt/other."
                )
    uri = "" if writes_to_mlflow is None else tracking.tracking_uri(writes_to_mlflow)
    local = environment.database_file(uri)
    if local and not is_shared(str(local)):
        raise DistillKacError(
            f"The runs would be tracked in {uri}, a file on this machine, but the cluster has {machines}. Start mlflow "
            "server, and set MLFLOW_TRACKING_URI to http://HOST:5000."
        )


def cache_of(is_used: bool = True) -> dict[str, str]:
    """The cache folder as a path for ``check_shared``, or no path if machines do not share cached files."""
    return {cache.VARIABLE: cache.cache_folder()} if is_used else {}


def is_shared(path: str) -> bool:
    """Whether all machines can use the path: it is a URI, or in a folder of ``DISTILLKAC_SHARED_FOLDERS``.

    Raises:
        ArgumentError: a folder in the variable is not absolute.
    """
    if files.is_uri(path):
        return True
    local = os.path.abspath(files.locate(path).path)
    for folder in filter(None, os.environ.get(SHARED_VARIABLE, "").split(":")):
        expanded = os.path.normpath(os.path.expanduser(folder))
        if not os.path.isabs(expanded):
            raise ArgumentError(f"{SHARED_VARIABLE} has {folder}. Set it to absolute folders, separated by colons.")
        if os.path.commonpath([local, expanded]) == expanded:
            return True
    return False
