"""Decode a dataset into the cache by Ray Data: what ``open_dataset`` would do alone, on all CPUs of the cluster.

The unit of work is a piece: some encoded images, and where they belong. Each task writes its images straight to their
place in the cache; only their number comes back.
"""

from collections.abc import Iterator
from typing import Any

from kac.data import DataConfig, DataDescription, begin_decoding, open_dataset
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
"""Fewer are decoded by this process: Ray and its workers need ten seconds to start."""

PAUSE_SECONDS = 0.1

DATA_FILE = "data.json"
"""The artifact of a run that describes the data it learned."""


def open_described(stage: str, config: DataConfig) -> DataDescription:
    """The description of a dataset, decoded first if need be; prints what is trained on, what is held out, and why.

    Raises:
        DistillKacError: as ``prepare``.
    """
    prepare(config)
    data = open_dataset(config).description
    log.info("\n".join(f"{stage}: {line}" for line in describe(config, data)))
    return data


def describe(config: DataConfig, data: DataDescription) -> list[str]:
    """A line on the split, one on the classes if they have names, and one for each warning."""
    lines = [f"{config.kind}: {data.train:,} training and {data.held_out:,} held-out images: {data.split}"]
    if data.class_names:
        lines.append(f"classes, label=name: {list_classes(data.class_names)}")
    return lines + [f"warning: {warning}" for warning in data.warnings]


def log_data(run: TrackedRun, data: DataDescription) -> None:
    """Keep the description of a dataset with the run that learns it: as an artifact, and in short as tags."""
    run.artifact(DATA_FILE, data.model_dump_json(indent=1).encode())
    lines = {"split": data.split, "classes": list_classes(data.class_names)}
    run.tags({f"distillkac.data.{name}": text for name, text in lines.items() if text})


def prepare(config: DataConfig, from_images: int = FROM_IMAGES) -> None:
    """Bring a dataset into the cache; what is there already is not decoded again.

    Args:
        from_images: datasets of so many are decoded by Ray, smaller ones by this process.

    Raises:
        DistillKacError: files are missing or damaged, or do not fit together.
    """
    begun = begin_decoding(config)
    if begun is None:
        return
    with begun as work:
        total = sum(len(piece.held_out) for piece in work.pieces)
        is_much = total >= from_images and len(work.pieces) > 1
        decode = _on_cluster if is_much and _is_for_all(config) else _here
        with ProgressBar("decode", total, "images") as bar:
            for images in decode(work.writer, work.pieces):
                bar.update(images)
        work.finish()


def _is_for_all(config: DataConfig) -> bool:
    """Whether other machines of the cluster, if there are any, see the files and the cache."""
    try:
        storage.check_shared({"`data.root`": config.root, **storage.cache_of()}, lambda: True)
    except ArgumentError as error:
        log.info(f"decode: on this machine alone: {error}")
        return False
    return True


def _here(writer: Writer, pieces: list[Piece]) -> Iterator[int]:
    return map(writer.write, pieces)


def _on_cluster(writer: Writer, pieces: list[Piece]) -> Iterator[int]:
    """How many images each piece had, as it is written."""
    import ray

    cluster.connect()
    # A task fetches its own piece: the names of all files together may be many.
    places = [ray.put(piece) for piece in pieces]

    def write(batch: dict[str, Any]) -> dict[str, Any]:
        images, refusal = 0, ""
        try:
            images = writer.write(ray.get(places[int(batch["item"][0])]))
        except DistillKacError as error:
            refusal = str(error)
        return {"images": [images], "refusal": [refusal]}

    written = each(range(len(pieces)), write, pause_seconds=PAUSE_SECONDS, blocks=len(pieces))
    try:
        for row in written.iter_rows():
            if row["refusal"]:
                raise DistillKacError(row["refusal"])
            yield int(row["images"])
    except ray.exceptions.RayError as error:
        raise DistillKacError(f"decoding failed in Ray: {one_line(str(error)[-300:])}") from error
