"""The cache of decoded images, and of latents. Each split is one .npy file. Only the rows in use are read.

    CACHE/data/KEY/{train,held_out}-{images,labels}.npy, dataset.json

KEY is a hash of the options and the file stamps, so changed files are decoded again. The folder is written under a
temporary name, so readers see a complete folder or none. If two processes decode at once, one result is kept.

A cache on ``s3://`` stores the images as blocks, ``KEY/<split>-images/<first row>``, which any machine can write in any
order, and dataset.json, which is written last. Each machine copies the cache once to a folder below TMPDIR.
"""

import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kac.data.dataset import (
    Contents,
    DataDescription,
    Dataset,
    LabelledImages,
    Source,
    check_labels,
    every_nth_of_each_class,
)
from kac.util import files
from kac.util.cache import VARIABLE, cache_folder
from kac.util.errors import DistillKacError
from kac.util.fingerprint import fingerprint
from kac.util.images import from_bytes

VERSION = 2
"""Version of the cached content, part of every key. Version 2 added EXIF orientation, class names and checksums."""

SPLITS = ("train", "held_out")
DESCRIPTION_FILE = "dataset.json"
BLOCKS_AT_ONCE = 8
"""The number of blocks that are read from S3 in parallel."""

HASHED_AT_ONCE = 2**24  # bytes


class CachePaths(NamedTuple):
    """Where the cache stores a decoded dataset."""

    shared: str  # in the cache folder: a path or s3:// URI
    local: str  # where this machine reads the dataset; differs from ``shared`` only if ``shared`` is on S3
    dtype: str = Source.dtype


class Piece(NamedTuple):
    """A unit of a source, and the cache rows of the unit's images."""

    content: Any
    held_out: np.ndarray  # [count] bool
    first_rows: tuple[int, int]  # in each split, the row of the unit's first image of that split


class Writer(NamedTuple):
    """Decodes pieces into the cache. A writer can be sent to any process of the cluster."""

    source: Source
    shape: tuple[int, ...]
    folder: str  # a local folder with files of their final size, or an s3:// prefix for blocks

    def write(self, piece: Piece) -> int:
        """Decode a piece, write its images to the cache, and return the number of images."""
        if not self.folder.startswith("s3://"):
            try:
                os.utime(self.folder)  # marks the folder as in use
            except FileNotFoundError:
                raise DistillKacError(
                    f"{VARIABLE} must be on s3:// or a folder that all machines share, but {os.uname().nodename} "
                    f"cannot find {self.folder}."
                ) from None
        rows, done = list(piece.first_rows), 0
        for block in self.source.decode(piece.content, self.shape):
            held_out = piece.held_out[done : done + len(block)]
            for i, chosen in enumerate((block[~held_out], block[held_out])):
                if len(chosen):
                    self._write_rows(SPLITS[i], rows[i], chosen)
                rows[i] += len(chosen)
            done += len(block)
        if done != len(piece.held_out):
            raise DistillKacError(
                f"The files changed while they were decoded: there are {done:,} images instead of "
                f"{len(piece.held_out):,}. Try again."
            )
        return done

    def _write_rows(self, split: str, row: int, images: np.ndarray) -> None:
        path = files.join(self.folder, f"{split}-images")
        if self.folder.startswith("s3://"):
            files.write_bytes(files.join(path, f"{row:012d}"), images.tobytes())
            return
        with open(f"{path}.npy", "r+b") as file:  # memory maps on NFS would overwrite other machines' rows
            _read_header(file)
            file.seek(row * images[0].nbytes, os.SEEK_CUR)
            file.write(np.ascontiguousarray(images).data)


class Decoding(NamedTuple):
    """A dataset that is being decoded. Write every piece once, in any order, and then call ``finish``."""

    writer: Writer
    pieces: list[Piece]
    finish: Callable[[], Dataset]


class DecodedSplit:
    """A split in the cache. Only the labels and the rows in use are in memory."""

    def __init__(self, folder: str, split: str) -> None:
        self.labels = torch.from_numpy(np.load(f"{folder}/{split}-labels.npy"))
        # Keep the file open, so that the split is readable even if the cache is deleted. Do not use a memory map,
        # because its pages would count as the process's memory.
        self._file = open(f"{folder}/{split}-images.npy", "rb", buffering=0)  # noqa: SIM115
        self._shape, self._dtype = _read_header(self._file)
        self._start = self._file.tell()
        expected = self._start + math.prod(self._shape) * self._dtype.itemsize
        found = os.fstat(self._file.fileno()).st_size
        if found != expected or self._shape[0] != len(self.labels):
            raise DistillKacError(
                f"{self._file.name} is damaged: it has {found:,} bytes instead of {expected:,}. Delete {folder}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, ids: Tensor) -> LabelledImages:
        """Return the rows ``ids`` [rows], int64 in 0 .. len - 1, in the order given."""
        images = np.empty((len(ids), *self._shape[1:]), self._dtype)
        labels = self.labels[ids]  # raises IndexError if an id is out of range
        for image, i in zip(images, ids.tolist(), strict=True):
            os.preadv(self._file.fileno(), [image], self._start + image.nbytes * (i % len(self)))
        rows = torch.from_numpy(images)
        return LabelledImages(from_bytes(rows) if self._dtype == np.uint8 else rows, labels)


def cache_paths(source: Source, options: dict[str, Any]) -> CachePaths:
    """Return the paths where the cache stores a source's images, decoded with ``options``."""
    stamps = hashlib.sha256()
    for stamp in source.stamps():
        stamps.update(f"{stamp.path}\0{stamp.size}\0{stamp.version}\n".encode())
    key = fingerprint({"version": VERSION, "stamps": stamps.hexdigest(), **options})
    shared = files.join(cache_folder("data"), key)
    on_this_machine = Path(tempfile.gettempdir()) / f"distillkac-{os.getuid()}" / "data" / key
    local = str(on_this_machine) if shared.startswith("s3://") else files.locate(shared).path
    return CachePaths(shared, local, source.dtype)


def find(paths: CachePaths) -> Dataset | None:
    """Return the dataset from the cache, or None if the cache does not contain it."""
    if os.path.exists(f"{paths.local}/{DESCRIPTION_FILE}"):
        return _open(paths.local)
    if paths.shared == paths.local or not files.exists(files.join(paths.shared, DESCRIPTION_FILE)):
        return None
    data = files.read_bytes(files.join(paths.shared, DESCRIPTION_FILE))
    description = DataDescription.model_validate_json(data)
    with _local_folder(paths.local) as folder:
        for split, count in zip(SPLITS, (description.train, description.held_out), strict=True):
            name = f"{split}-labels.npy"
            Path(folder, name).write_bytes(files.read_bytes(files.join(paths.shared, name)))
            _allocate(folder, split, (count, *description.sample_shape), paths.dtype)
        _download_images(paths.shared, folder)
        return _publish(folder, paths.local, description)


@contextmanager
def decoding(source: Source, paths: CachePaths) -> Iterator[Decoding]:
    """Begin to decode a source into the cache. Local files are removed unless the ``with`` block calls ``finish``."""
    contents, is_remote = source.contents(), paths.shared != paths.local
    held_out = contents.held_out
    if held_out is None:
        held_out = every_nth_of_each_class(torch.from_numpy(contents.labels)).numpy()
    check_labels(source.root, contents.labels, contents.num_classes, held_out)
    with _local_folder(paths.local) as folder:
        _check_room(folder, contents, source.dtype)
        for split, labels in zip(SPLITS, (contents.labels[~held_out], contents.labels[held_out]), strict=True):
            name = f"{split}-labels.npy"
            np.save(f"{folder}/{name}", labels)
            if is_remote:
                files.write_bytes(files.join(paths.shared, name), Path(folder, name).read_bytes())
            _allocate(folder, split, (len(labels), *contents.shape), source.dtype)

        def finish() -> Dataset:
            if is_remote:
                _download_images(paths.shared, folder)
            description = _describe(folder, contents)
            if is_remote:
                data = description.model_dump_json(indent=1).encode()
                files.write_bytes(files.join(paths.shared, DESCRIPTION_FILE), data)
            return _publish(folder, paths.local, description)

        writer = Writer(source, contents.shape, paths.shared if is_remote else folder)
        yield Decoding(writer, _pieces(contents, held_out), finish)


def decode_here(source: Source, paths: CachePaths) -> Dataset:
    """Decode a source in this process."""
    with decoding(source, paths) as work:
        for piece in tqdm(work.pieces, desc="decode", mininterval=1.0):
            work.writer.write(piece)
        return work.finish()


def _check_room(folder: str, contents: Contents, dtype: str) -> None:
    images, side = len(contents.labels), "x".join(map(str, contents.shape[:0:-1]))
    needed, free = images * math.prod(contents.shape) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise DistillKacError(
            f"{os.path.dirname(folder)}: {images:,} images of {side} pixels need {needed / 1e9:,.1f} GB, but this disk "
            f"has only {free / 1e9:,.1f} GB free. Free some space, set {VARIABLE} (or TMPDIR, if the cache is on "
            "s3://) to another disk, or reduce the images with `data.size`."
        )


def _pieces(contents: Contents, held_out: np.ndarray) -> list[Piece]:
    pieces, start, held_out_row = [], 0, 0
    for unit in contents.units:
        is_held_out = held_out[start : start + unit.images]
        pieces.append(Piece(unit.content, is_held_out, (start - held_out_row, held_out_row)))
        start += unit.images
        held_out_row += int(is_held_out.sum())
    return pieces


def _allocate(folder: str, split: str, shape: tuple[int, ...], dtype: str) -> None:
    np.lib.format.open_memmap(f"{folder}/{split}-images.npy", mode="w+", dtype=np.dtype(dtype), shape=shape)


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and type of the array in a .npy file, and move the file position to the first value."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype


@contextmanager
def _local_folder(path: str) -> Iterator[str]:
    """Create a temporary folder next to ``path``. Remove it at the end of the block unless it has been renamed."""
    parent = os.path.dirname(path)
    os.makedirs(parent, exist_ok=True)
    files.remove_orphans(parent)
    folder = files.temporary_name(path)
    os.mkdir(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: str, path: str, description: DataDescription) -> Dataset:
    """Rename a complete folder to ``path``. If another process has created ``path``, open that folder instead."""
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
    content, splits = hashlib.sha256(), []
    for split in SPLITS:
        labels = np.load(f"{folder}/{split}-labels.npy")
        with open(f"{folder}/{split}-images.npy", "rb") as file:
            _read_header(file)
            while not contents.sha256 and (data := file.read(HASHED_AT_ONCE)):
                content.update(data)
        content.update(labels.data)
        splits.append(labels)
    train, held_out = splits
    counts = [len(train), len(held_out)]
    identity = {"content": content.hexdigest(), "sample_shape": list(contents.shape), "counts": counts}
    return DataDescription(
        sample_shape=contents.shape,
        num_classes=contents.num_classes,
        class_frequencies=tuple((np.bincount(train, minlength=contents.num_classes) / len(train)).tolist()),
        train=len(train),
        held_out=len(held_out),
        sha256=contents.sha256 or fingerprint(identity),
        class_names=contents.class_names,
        split=contents.split,
        warnings=contents.warnings,
    )


def _download_images(shared: str, folder: str) -> None:
    for split in SPLITS:
        below = files.join(shared, f"{split}-images")
        sizes = files.list_sizes(below)
        names = [files.join(below, name) for name in sizes]
        with open(f"{folder}/{split}-images.npy", "r+b") as file, ThreadPoolExecutor(BLOCKS_AT_ONCE) as readers:
            shape, dtype = _read_header(file)
            found, expected = sum(sizes.values()), math.prod(shape) * dtype.itemsize
            if found != expected:
                raise DistillKacError(
                    f"{below} is damaged: it has {found:,} bytes instead of {expected:,}. Delete {shared}."
                )
            for first in range(0, len(names), BLOCKS_AT_ONCE):
                for data in readers.map(files.read_bytes, names[first : first + BLOCKS_AT_ONCE]):
                    file.write(data)
