"""Decode a dataset into the cache with Ray Data, on all of the cluster's CPUs. ``open_dataset`` uses one process.

Each task decodes one piece: a group of encoded images, with their row numbers in the cache. The task writes the images
directly into the cache, and returns only their number. Tasks that encode latents use GPUs if there are any.
"""

from collections.abc import Iterator
from typing import Any

from kac.data import DataConfig, DataDescription, begin_decoding, describe_dataset, open_autoencoder
from kac.data.autoencoder import LatentSource
from kac.data.class_names import list_classes
from kac.data.decoded import Piece, Writer
from kac.util.errors import ArgumentError, DistillKacError, one_line
from kac.util.log import log
from pipeline.cluster import connection as cluster
from pipeline.cluster import storage
from pipeline.cluster.ray_data import each
from pipeline.progress import ProgressBar
from pipeline.tracking import TrackedRun

FROM_IMAGES = 20_000
"""This process decodes datasets with fewer images, because Ray and its workers take ten seconds to start."""

PAUSE_SECONDS = 0.1

DATA_FILE = "data.json"
"""Name of the artifact that describes a run's training data."""


def open_described(stage: str, config: DataConfig, *, is_read: bool = True) -> DataDescription:
    """Decode a dataset if necessary, log its split and its classes, and return its description.

    If the stage does not read the dataset, latents are not encoded.

    Raises:
        DistillKacError: files are missing, damaged or inconsistent.
    """
    prepare(config if is_read else config.images)
    data = describe_dataset(config)
    lines = [f"{config.kind}: {data.train:,} training and {data.held_out:,} held-out images: {data.split}"]
    if data.class_names:
        lines.append(f"classes, label=name: {list_classes(data.class_names)}")
    lines += [f"warning: {warning}" for warning in data.warnings]
    log.info("\n".join(f"{stage}: {line}" for line in lines))
    return data


def log_data(run: TrackedRun, data: DataDescription) -> None:
    """Log a dataset's description to the run that trains on it: in full as an artifact, and its main facts as tags."""
    run.artifact(DATA_FILE, data.model_dump_json(indent=1).encode())
    tags = {"split": data.split, "classes": list_classes(data.class_names)}
    run.tags({f"distillkac.data.{name}": text for name, text in tags.items() if text})


def prepare(config: DataConfig, from_images: int = FROM_IMAGES) -> None:
    """Decode a dataset into the cache, if necessary. Ray decodes datasets of at least ``from_images`` images.

    Raises:
        DistillKacError: files are missing, damaged or inconsistent.
    """
    if config.autoencoder:
        open_autoencoder(config.autoencoder)  # report a wrong folder before the images are decoded
        prepare(config.images, from_images)
    decoding = begin_decoding(config)
    if decoding is None:
        return
    with decoding as work:
        total = sum(len(piece.held_out) for piece in work.pieces)
        is_large = total >= from_images and len(work.pieces) > 1
        on_cluster = is_large and _is_shared(config)
        written = _decode_on_cluster(work.writer, work.pieces) if on_cluster else map(work.writer.write, work.pieces)
        with ProgressBar("decode", total, "images") as bar:
            for images in written:
                bar.update(images)
        work.finish()


def _is_shared(config: DataConfig) -> bool:
    """Whether every machine in the cluster can access the data files and the cache."""
    try:
        storage.check_shared({**config.paths(), **storage.cache_of()}, lambda: True)
    except ArgumentError as error:
        log.info(f"decode: using only this machine. {error}")
        return False
    return True


def _decode_on_cluster(writer: Writer, pieces: list[Piece]) -> Iterator[int]:
    """Yield the number of images in each piece, after a task has written the piece."""
    import ray

    cluster.connect()
    # Each task fetches only its own part of the file list, because the whole list can be large.
    references = [ray.put(piece) for piece in pieces]

    def write(batch: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"images": [writer.write(ray.get(references[int(batch["item"][0])]))], "failure": [""]}
        except DistillKacError as error:
            return {"images": [0], "failure": [str(error)]}

    encodes_on_gpu = isinstance(writer.source, LatentSource) and ray.cluster_resources().get("GPU")
    gpus = {"num_gpus": 1} if encodes_on_gpu else {}
    written = each(range(len(pieces)), write, pause_seconds=PAUSE_SECONDS, blocks=len(pieces), **gpus)
    try:
        for row in written.iter_rows():
            if row["failure"]:
                raise DistillKacError(row["failure"])
            yield int(row["images"])
    except ray.exceptions.RayError as error:
        raise DistillKacError(f"Ray could not decode the data: {one_line(str(error)[-300:])}.") from error
