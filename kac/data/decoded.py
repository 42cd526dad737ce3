"""The cache of decoded images. Each split is a .npy file of bytes; only the rows in use are read into memory.

    CACHE/data/KEY/{train,held_out}-{images,labels}.npy, dataset.json

KEY is a hash of the options and of the stamps of the files, so changed files are decoded again. The folder is written
under a temporary name: readers see the complete folder or nothing. If two processes decode at once, the first wins.

A cache on ``s3://`` stores the images as blocks, ``KEY/<split>-images/<first row>``, which any machine can write in any
order, and dataset.json, which is written last. Each machine copies the cache once to a folder below TMPDIR.
"""

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kac.data.source import Contents, Source, check_labels
from kac.data.splits import HELD_OUT_EVERY, DataDescription, Dataset, LabelledImages, every_nth_of_each_class
from kac.util import files
from kac.util.cache import VARIABLE, cache_folder
from kac.util.errors import DistillKacError
from kac.util.fingerprint import fingerprint
from kac.util.images import from_bytes

VERSION = 2
"""Version of the cached content, part of every key. 2: EXIF orientation, class names, verified checksums."""

SPLITS = ("train", "held_out")
DESCRIPTION_FILE = "dataset.json"
BLOCKS_AT_ONCE = 8
"""The number of blocks that are read from S3 in parallel."""

HASHED_AT_ONCE = 2**24  # bytes


class CachePaths(NamedTuple):
    """Where the cache stores a decoded dataset."""

    shared: str  # in the cache folder: a path or s3:// URI
    local: str  # where this machine reads it; differs from ``shared`` only if that is on S3

    @property
    def is_remote(self) -> bool:
        """Whether the cache is on S3."""
        return self.shared != self.local


class Piece(NamedTuple):
    """A unit of a source, and the rows of its images in the cache."""

    content: Any
    held_out: np.ndarray  # [count] bool
    first_rows: tuple[int, int]  # of its training images and of its held-out images, in their splits


class Writer(NamedTuple):
    """Decodes pieces into the cache. It can be sent to any process of the cluster."""

    source: Source
    shape: tuple[int, ...]
    folder: str  # a local folder with files of their final size, or an s3:// prefix for blocks

    def write(self, piece: Piece) -> int:
        """Decode a piece, write its images to their rows, and return their number."""
        if not self.folder.startswith("s3://"):
            self._check_visible()
        rows, done = list(piece.first_rows), 0
        for block in self.source.decode(piece.content, self.shape):
            held_out = piece.held_out[done : done + len(block)]
            for i, chosen in enumerate((block[~held_out], block[held_out])):
                if len(chosen):
                    _write_rows(self.folder, SPLITS[i], rows[i], chosen)
                rows[i] += len(chosen)
            done += len(block)
        if done != len(piece.held_out):
            raise DistillKacError(
                f"The files changed while they were decoded: there are {done:,} images instead of "
                f"{len(piece.held_out):,}. Try again."
            )
        return done

    def _check_visible(self) -> None:
        """Raise if this machine does not see the folder; else touch it, to mark that it is in use."""
        try:
            os.utime(self.folder)
        except FileNotFoundError:
            raise DistillKacError(
                f"{VARIABLE} must be on s3:// or in a folder that every machine sees, but {os.uname().nodename} does "
                f"not see {self.folder}."
            ) from None


class Decoding(NamedTuple):
    """A decoding in progress. Write every piece once, in any order, then call ``finish``."""

    writer: Writer
    pieces: list[Piece]
    finish: Callable[[], Dataset]


class DecodedSplit:
    """A split in the cache. Memory holds only the labels and the rows in use."""

    def __init__(self, folder: str, split: str) -> None:
        self.labels = torch.from_numpy(np.load(f"{folder}/{split}-labels.npy"))
        # The file stays open, so that the split is readable even if the cache is deleted.
        self._file = open(f"{folder}/{split}-images.npy", "rb", buffering=0)  # noqa: SIM115
        self._shape, self._start = _read_header(self._file)
        expected = self._start + int(np.prod(self._shape))
        found = os.fstat(self._file.fileno()).st_size
        if found != expected or self._shape[0] != len(self.labels):
            raise DistillKacError(
                f"{self._file.name} is damaged: it has {found:,} bytes instead of {expected:,}. Delete {folder}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, ids: Tensor) -> LabelledImages:
        """Return the rows ``ids`` [rows], int64 in 0 .. len - 1, in this order."""
        images = np.empty((len(ids), *self._shape[1:]), np.uint8)
        labels = self.labels[ids]  # raises IndexError if an id is out of range
        for image, i in zip(images, ids.tolist(), strict=True):
            os.preadv(self._file.fileno(), [image], self._start + image.nbytes * (i % len(self)))
        return LabelledImages(from_bytes(torch.from_numpy(images)), labels)


def cache_paths(source: Source, options: dict[str, Any]) -> CachePaths:
    """Return where the cache stores the images of a source, decoded with these options."""
    stamps = hashlib.sha256()
    for stamp in source.stamps():
        stamps.update(f"{stamp.path}\0{stamp.size}\0{stamp.version}\n".encode())
    key = fingerprint({"version": VERSION, "stamps": stamps.hexdigest(), **options})
    shared = files.join(cache_folder("data"), key)
    on_this_machine = Path(tempfile.gettempdir()) / f"distillkac-{os.getuid()}" / "data" / key
    return CachePaths(shared, str(on_this_machine) if shared.startswith("s3://") else files.locate(shared).path)


def find(paths: CachePaths) -> Dataset | None:
    """Return the dataset from the cache; None if it is not decoded yet."""
    if os.path.exists(f"{paths.local}/{DESCRIPTION_FILE}"):
        return _open(paths.local)
    if paths.is_remote and files.exists(files.join(paths.shared, DESCRIPTION_FILE)):
        with _local_folder(paths.local) as folder:
            _download(paths.shared, folder)
            data = files.read_bytes(files.join(paths.shared, DESCRIPTION_FILE))
            return _publish(folder, paths.local, DataDescription.model_validate_json(data))
    return None


@contextmanager
def decoding(source: Source, root: str, paths: CachePaths) -> Iterator[Decoding]:
    """Begin to decode a source into the cache. Everything is removed unless the block calls ``finish``.

    Raises:
        DistillKacError: the files are not a dataset.
    """
    contents = source.contents()
    held_out = contents.held_out
    if held_out is None:
        held_out = every_nth_of_each_class(torch.from_numpy(contents.labels), HELD_OUT_EVERY).numpy()
    check_labels(root, contents.labels, contents.num_classes, held_out)
    splits = [contents.labels[~held_out], contents.labels[held_out]]
    with _local_folder(paths.local) as folder:
        _check_room(folder, contents)
        for split, labels in zip(SPLITS, splits, strict=True):
            np.save(f"{folder}/{split}-labels.npy", labels)
            shape = (len(labels), *contents.shape)
            np.lib.format.open_memmap(f"{folder}/{split}-images.npy", mode="w+", dtype=np.uint8, shape=shape)

        def finish() -> Dataset:
            if paths.is_remote:
                _download_images(paths.shared, folder)
            description = _describe(folder, contents)
            if paths.is_remote:
                _upload(folder, paths.shared, description)
            return _publish(folder, paths.local, description)

        writer = Writer(source, contents.shape, paths.shared if paths.is_remote else folder)
        pieces = _pieces([(unit.images, unit.content) for unit in contents.units], held_out)
        yield Decoding(writer, list(pieces), finish)


def decode_here(source: Source, root: str, paths: CachePaths) -> Dataset:
    """Decode a source in this process."""
    from tqdm import tqdm

    with decoding(source, root, paths) as work:
        total = sum(len(piece.held_out) for piece in work.pieces)
        with tqdm(desc="decode", total=total, unit="image", mininterval=1.0) as bar:
            for piece in work.pieces:
                bar.update(work.writer.write(piece))
        return work.finish()


def _check_room(folder: str, contents: Contents) -> None:
    """Raise ``DistillKacError`` if the decoded images do not fit on the disk."""
    images, side = len(contents.labels), "x".join(map(str, contents.shape[:0:-1]))
    parent = os.path.dirname(folder)
    needed, free = images * math.prod(contents.shape), shutil.disk_usage(folder).free
    if needed > free:
        raise DistillKacError(
            f"{parent}: {images:,} images of {side} pixels need {needed / 1e9:,.1f} GB, but this disk has only "
            f"{free / 1e9:,.1f} GB free. Free some space, set {VARIABLE} to another disk (TMPDIR if it is on s3://), "
            "or reduce the images with `data.size`."
        )


def _pieces(units: Iterable[tuple[int, Any]], held_out: np.ndarray) -> Iterator[Piece]:
    start = train_row = held_out_row = 0
    for count, content in units:
        is_held_out = held_out[start : start + count]
        yield Piece(content, is_held_out, (train_row, held_out_row))
        start += count
        held_out_row += int(is_held_out.sum())
        train_row = start - held_out_row


def _write_rows(folder: str, split: str, row: int, images: np.ndarray) -> None:
    if folder.startswith("s3://"):
        files.write_bytes(files.join(folder, f"{split}-images/{row:012d}"), images.tobytes())
        return
    with open(f"{folder}/{split}-images.npy", "r+b") as file:
        _, start = _read_header(file)
        file.seek(start + row * images[0].nbytes)
        file.write(np.ascontiguousarray(images).data)


def _read_header(file: Any) -> tuple[tuple[int, ...], int]:
    """Return the shape of the array in a .npy file, and the offset of its values."""
    np.lib.format.read_magic(file)
    shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return shape, file.tell()


@contextmanager
def _local_folder(beside: str) -> Iterator[str]:
    """Make a temporary folder beside a path. It is removed at the end unless it was renamed."""
    parent = os.path.dirname(beside)
    os.makedirs(parent, exist_ok=True)
    files.remove_orphans(parent)
    folder = files.temporary_name(beside)
    os.mkdir(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: str, path: str, description: DataDescription) -> Dataset:
    """Rename a complete folder to ``path``, or use the folder of another process that was first."""
    for entry in os.scandir(folder):
        with open(entry.path, "rb") as file:
            os.fsync(file.fileno())
    files.write_bytes(f"{folder}/{DESCRIPTION_FILE}", description.model_dump_json(indent=1).encode())
    try:
        os.rename(folder, path)
    except OSError:
        if not os.path.exists(f"{path}/{DESCRIPTION_FILE}"):
            raise
    return _open(path)


def _open(folder: str) -> Dataset:
    description = DataDescription.model_validate_json(files.read_bytes(f"{folder}/{DESCRIPTION_FILE}"))
    train, held_out = (DecodedSplit(folder, split) for split in SPLITS)
    return Dataset(description, train, held_out)


def _describe(folder: str, contents: Contents) -> DataDescription:
    """Describe the dataset in a folder, reading every byte once."""
    content, counts, frequencies = hashlib.sha256(), [], []
    for split in SPLITS:
        labels = np.load(f"{folder}/{split}-labels.npy")
        with open(f"{folder}/{split}-images.npy", "rb") as file:
            _read_header(file)
            while data := file.read(HASHED_AT_ONCE):
                content.update(data)
        content.update(labels.data)
        counts.append(len(labels))
        frequencies.append(np.bincount(labels, minlength=contents.num_classes) / len(labels))
    identity = {"content": content.hexdigest(), "sample_shape": list(contents.shape), "counts": counts}
    return DataDescription(
        sample_shape=contents.shape,
        num_classes=contents.num_classes,
        class_frequencies=tuple(frequencies[0].tolist()),
        train=counts[0],
        held_out=counts[1],
        sha256=fingerprint(identity),
        class_names=contents.class_names,
        split=contents.split,
        warnings=contents.warnings,
    )


def _upload(folder: str, shared: str, description: DataDescription) -> None:
    """Complete a prefix that has all blocks: write the labels and the description."""
    for split in SPLITS:
        name = f"{split}-labels.npy"
        files.write_bytes(files.join(shared, name), Path(folder, name).read_bytes())
    files.write_bytes(files.join(shared, DESCRIPTION_FILE), description.model_dump_json(indent=1).encode())


def _download(shared: str, folder: str) -> None:
    """Copy a complete prefix to a local folder, without its description."""
    description = DataDescription.model_validate_json(files.read_bytes(files.join(shared, DESCRIPTION_FILE)))
    for split, count in zip(SPLITS, (description.train, description.held_out), strict=True):
        name, shape = f"{split}-labels.npy", (count, *description.sample_shape)
        Path(folder, name).write_bytes(files.read_bytes(files.join(shared, name)))
        np.lib.format.open_memmap(f"{folder}/{split}-images.npy", mode="w+", dtype=np.uint8, shape=shape)
    _download_images(shared, folder)


def _download_images(shared: str, folder: str) -> None:
    """Copy the blocks of a prefix into the image files of a local folder."""
    for split in SPLITS:
        below = files.join(shared, f"{split}-images")
        sizes = files.list_sizes(below)
        with open(f"{folder}/{split}-images.npy", "r+b") as file, ThreadPoolExecutor(BLOCKS_AT_ONCE) as readers:
            shape, start = _read_header(file)
            if sum(sizes.values()) != int(np.prod(shape)):
                raise DistillKacError(
                    f"{below} is damaged: it has {sum(sizes.values()):,} bytes instead of {int(np.prod(shape)):,}. "
                    f"Delete {shared}."
                )
            names = [files.join(below, name) for name in sizes]
            file.seek(start)
            for first in range(0, len(names), BLOCKS_AT_ONCE):
                for data in readers.map(files.read_bytes, names[first : first + BLOCKS_AT_ONCE]):
                    file.write(data)
