"""The typed cache of decoded images: each split one .npy file of bytes, of which memory holds the rows in use alone.

    CACHE/data/KEY/{train,held_out}-{images,labels}.npy, dataset.json

KEY names the options and the stamps of the files, so that what changed is decoded anew. The folder is written under a
temporary name: readers see all of it or nothing, and of two processes that decode at once the first one's is used.

A cache on ``s3://`` has the images as blocks, ``KEY/<split>-images/<first row>``, which any machine writes in any
order, and dataset.json, written last. Each machine copies it once to a folder of its own below TMPDIR.
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
"""Of what is written here; part of every key. 2: images upright by EXIF, names of classes, checksums verified."""

SPLITS = ("train", "held_out")
DESCRIPTION_FILE = "dataset.json"
BLOCKS_AT_ONCE = 8
"""How many blocks of a cache on S3 are read at once."""

HASHED_AT_ONCE = 2**24


class Place(NamedTuple):
    """Where a decoded dataset is kept."""

    shared: str  # below the cache folder: a path or s3:// URI
    local: str  # where this machine reads it: the same, unless that is on S3

    @property
    def is_remote(self) -> bool:
        """Whether the two differ."""
        return self.shared != self.local


class Piece(NamedTuple):
    """A unit of a source, and where its images belong."""

    content: Any
    held_out: np.ndarray  # [count] bool
    first_rows: tuple[int, int]  # of the training images and of those held out, in their splits


class Writer(NamedTuple):
    """What a process needs in order to decode pieces; any process of the cluster can."""

    source: Source
    shape: tuple[int, ...]
    folder: str  # a local folder with files of the final size, or an s3:// prefix for blocks

    def write(self, piece: Piece) -> int:
        """Decode a piece and put its images in their places; returns how many there are."""
        if not self.folder.startswith("s3://"):
            self._check_visible()
        rows, done = list(piece.first_rows), 0
        for block in self.source.decode(piece.content, self.shape):
            held_out = piece.held_out[done : done + len(block)]
            for i, chosen in enumerate((block[~held_out], block[held_out])):
                if len(chosen):
                    _put(self.folder, SPLITS[i], rows[i], chosen)
                rows[i] += len(chosen)
            done += len(block)
        if done != len(piece.held_out):
            raise DistillKacError(f"expected {len(piece.held_out)} images of {piece.content}, found {done}: try again")
        return done

    def _check_visible(self) -> None:
        """Raise where this machine does not see the folder; else note that the folder is in use."""
        try:
            os.utime(self.folder)
        except FileNotFoundError:
            raise DistillKacError(
                f"DISTILLKAC_CACHE: expected a folder that every machine sees, or s3://, found {self.folder}, which "
                f"{os.uname().nodename} has not"
            ) from None


class Decoding(NamedTuple):
    """A decoding that is under way: every piece is written once, in any order, and then it is finished."""

    writer: Writer
    pieces: list[Piece]
    finish: Callable[[], Dataset]


class DecodedSplit:
    """A split in the cache. Memory holds the labels and the rows in use, however many images there are."""

    def __init__(self, folder: str, split: str) -> None:
        self.labels = torch.from_numpy(np.load(f"{folder}/{split}-labels.npy"))
        # Open as long as the split is in use: the cache may be emptied at any time.
        self._file = open(f"{folder}/{split}-images.npy", "rb", buffering=0)  # noqa: SIM115
        self._shape, self._start = _header(self._file)
        expected = self._start + int(np.prod(self._shape))
        found = os.fstat(self._file.fileno()).st_size
        if found != expected or self._shape[0] != len(self.labels):
            raise DistillKacError(f"{self._file.name}: expected {expected} bytes, found {found}: remove {folder}")

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, ids: Tensor) -> LabelledImages:
        """The rows ``ids`` [rows], int64 in 0 .. len - 1, in the order given."""
        images = np.empty((len(ids), *self._shape[1:]), np.uint8)
        labels = self.labels[ids]  # raises for ids that are out of range
        for image, i in zip(images, ids.tolist(), strict=True):
            os.preadv(self._file.fileno(), [image], self._start + image.nbytes * (i % len(self)))
        return LabelledImages(from_bytes(torch.from_numpy(images)), labels)


def place_of(source: Source, options: dict[str, Any]) -> Place:
    """Where the images of a source are, or will be, decoded with these options."""
    stamps = hashlib.sha256()
    for stamp in source.stamps():
        stamps.update(f"{stamp.path}\0{stamp.size}\0{stamp.version}\n".encode())
    key = fingerprint({"version": VERSION, "stamps": stamps.hexdigest(), **options})
    shared = files.join(cache_folder("data"), key)
    on_this_machine = Path(tempfile.gettempdir()) / f"distillkac-{os.getuid()}" / "data" / key
    return Place(shared, str(on_this_machine) if shared.startswith("s3://") else files.locate(shared).path)


def find(place: Place) -> Dataset | None:
    """The dataset at its place; None if it is not decoded yet."""
    if os.path.exists(f"{place.local}/{DESCRIPTION_FILE}"):
        return _open(place.local)
    if place.is_remote and files.exists(files.join(place.shared, DESCRIPTION_FILE)):
        with _local_folder(place.local) as folder:
            _copy(place.shared, folder)
            data = files.read_bytes(files.join(place.shared, DESCRIPTION_FILE))
            return _publish(folder, place.local, DataDescription.model_validate_json(data))
    return None


@contextmanager
def decoding(source: Source, root: str, place: Place) -> Iterator[Decoding]:
    """Begin to decode a source into its place; what is not finished within the block is removed.

    Raises:
        DistillKacError: the files do not hold a dataset.
    """
    contents = source.contents()
    held_out = contents.held_out
    if held_out is None:
        held_out = every_nth_of_each_class(torch.from_numpy(contents.labels), HELD_OUT_EVERY).numpy()
    check_labels(root, contents.labels, contents.num_classes, held_out)
    splits = [contents.labels[~held_out], contents.labels[held_out]]
    with _local_folder(place.local) as folder:
        _check_room(folder, contents)
        for split, labels in zip(SPLITS, splits, strict=True):
            np.save(f"{folder}/{split}-labels.npy", labels)
            shape = (len(labels), *contents.shape)
            np.lib.format.open_memmap(f"{folder}/{split}-images.npy", mode="w+", dtype=np.uint8, shape=shape)

        def finish() -> Dataset:
            if place.is_remote:
                _copy_images(place.shared, folder)
            description = _describe(folder, contents)
            if place.is_remote:
                _upload(folder, place.shared, description)
            return _publish(folder, place.local, description)

        writer = Writer(source, contents.shape, place.shared if place.is_remote else folder)
        pieces = _pieces([(unit.images, unit.content) for unit in contents.units], held_out)
        yield Decoding(writer, list(pieces), finish)


def decode_here(source: Source, root: str, place: Place) -> Dataset:
    """Decode a source in this process."""
    from tqdm import tqdm

    with decoding(source, root, place) as work:
        total = sum(len(piece.held_out) for piece in work.pieces)
        with tqdm(desc="decode", total=total, unit="image", mininterval=1.0) as bar:
            for piece in work.pieces:
                bar.update(work.writer.write(piece))
        return work.finish()


def _check_room(folder: str, contents: Contents) -> None:
    """Raise ``DistillKacError`` if the decoded images are more than the disk has room for."""
    images, side = len(contents.labels), "x".join(map(str, contents.shape[:0:-1]))
    parent = os.path.dirname(folder)
    needed, free = images * math.prod(contents.shape), shutil.disk_usage(folder).free
    if needed > free:
        raise DistillKacError(
            f"{parent}: {images:,} images of {side} take {needed / 1e9:,.1f} GB when decoded, and this disk has "
            f"{free / 1e9:,.1f} GB free. Make room, set {VARIABLE} to another disk (TMPDIR if it is on s3://), or make "
            "the images smaller by `data.size`"
        )


def _pieces(units: Iterable[tuple[int, Any]], held_out: np.ndarray) -> Iterator[Piece]:
    start = train_row = held_out_row = 0
    for count, content in units:
        which = held_out[start : start + count]
        yield Piece(content, which, (train_row, held_out_row))
        start += count
        held_out_row += int(which.sum())
        train_row = start - held_out_row


def _put(folder: str, split: str, row: int, images: np.ndarray) -> None:
    if folder.startswith("s3://"):
        files.write_bytes(files.join(folder, f"{split}-images/{row:012d}"), images.tobytes())
        return
    with open(f"{folder}/{split}-images.npy", "r+b") as file:
        _, start = _header(file)
        file.seek(start + row * images[0].nbytes)
        file.write(np.ascontiguousarray(images).data)


def _header(file: Any) -> tuple[tuple[int, ...], int]:
    """The shape of the array in a .npy file, and where it begins."""
    np.lib.format.read_magic(file)
    shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return shape, file.tell()


@contextmanager
def _local_folder(beside: str) -> Iterator[str]:
    """A temporary folder beside a path; it is removed if it is still there at the end."""
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
    """Give a complete folder its name; if another process was first, its folder is as good."""
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
    """The description of what lies in a folder; every byte is read once."""
    content, counts, frequencies = hashlib.sha256(), [], []
    for split in SPLITS:
        labels = np.load(f"{folder}/{split}-labels.npy")
        with open(f"{folder}/{split}-images.npy", "rb") as file:
            _header(file)
            while data := file.read(HASHED_AT_ONCE):
                content.update(data)
        content.update(labels.data)
        counts.append(len(labels))
        frequencies.append(np.bincount(labels, minlength=contents.num_classes) / len(labels))
    named = {"content": content.hexdigest(), "sample_shape": list(contents.shape), "counts": counts}
    return DataDescription(
        sample_shape=contents.shape,
        num_classes=contents.num_classes,
        class_frequencies=tuple(frequencies[0].tolist()),
        train=counts[0],
        held_out=counts[1],
        sha256=fingerprint(named),
        class_names=contents.class_names,
        split=contents.split,
        warnings=contents.warnings,
    )


def _upload(folder: str, shared: str, description: DataDescription) -> None:
    """What makes a prefix with all its blocks complete."""
    for split in SPLITS:
        name = f"{split}-labels.npy"
        files.write_bytes(files.join(shared, name), Path(folder, name).read_bytes())
    files.write_bytes(files.join(shared, DESCRIPTION_FILE), description.model_dump_json(indent=1).encode())


def _copy(shared: str, folder: str) -> None:
    """A complete prefix as a local folder, but for its description."""
    description = DataDescription.model_validate_json(files.read_bytes(files.join(shared, DESCRIPTION_FILE)))
    for split, count in zip(SPLITS, (description.train, description.held_out), strict=True):
        name, shape = f"{split}-labels.npy", (count, *description.sample_shape)
        Path(folder, name).write_bytes(files.read_bytes(files.join(shared, name)))
        np.lib.format.open_memmap(f"{folder}/{split}-images.npy", mode="w+", dtype=np.uint8, shape=shape)
    _copy_images(shared, folder)


def _copy_images(shared: str, folder: str) -> None:
    """The blocks of a prefix, to their places in the files of a local folder."""
    for split in SPLITS:
        below = files.join(shared, f"{split}-images")
        sizes = files.list_sizes(below)
        with open(f"{folder}/{split}-images.npy", "r+b") as file, ThreadPoolExecutor(BLOCKS_AT_ONCE) as readers:
            shape, start = _header(file)
            if sum(sizes.values()) != int(np.prod(shape)):
                found = sum(sizes.values())
                raise DistillKacError(f"{below}: expected {np.prod(shape)} bytes, found {found}: remove {shared}")
            names = [files.join(below, name) for name in sizes]
            file.seek(start)
            for first in range(0, len(names), BLOCKS_AT_ONCE):
                for data in readers.map(files.read_bytes, names[first : first + BLOCKS_AT_ONCE]):
                    file.write(data)
