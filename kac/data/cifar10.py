"""CIFAR-10 in the archive that its authors publish for Python: pickles, which are read without running what they say.

https://www.cs.toronto.edu/~kriz/cifar.html: ``cifar-10-python.tar.gz``, or its extracted folder. The test batch is held
out.
"""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from kac.data.source import Contents, Unit, images_a_block
from kac.util import files
from kac.util.errors import DistillKacError, one_line
from kac.util.integrity import gunzip

ARCHIVE = "cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
MD5_EXTRACTED = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""Of the published files. Extracted, they have no checksum of their own."""

FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"
META = "batches.meta"
"""The file with the names of the classes."""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The published names, for a folder without that file."""

SHAPE = (3, 32, 32)
MOST_BYTES = 2**30
"""Of the unpacked archive; the published one has 186 MB."""

ADVICE = f"fetch {ARCHIVE} again, its md5 is {MD5}"


class Batch(NamedTuple):
    """One of its files."""

    images: np.ndarray  # [count, 3, 32, 32], uint8
    labels: np.ndarray  # [count], int64


class Loaded(NamedTuple):
    """Everything that is in its files."""

    batches: dict[str, Batch]  # by name
    class_names: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Cifar10Source:
    """The archive ``root``, or a folder that holds the archive or its extracted files."""

    root: str

    def stamps(self) -> Iterator[files.Stamp]:
        """The archive, or the six batches and the names of the classes."""
        there = {stamp.path: stamp for stamp in files.walk(self.root)}
        for below in ("", f"{FOLDER}/"):
            if all(f"{below}{name}" in there for name in (*TRAIN, TEST)):
                return iter([there[f"{below}{name}"] for name in (*TRAIN, TEST, META) if f"{below}{name}" in there])
        archive = next((stamp for path, stamp in there.items() if path in {"", ARCHIVE}), None)
        if archive is None:
            raise DistillKacError(
                f"{self.root}: expected {ARCHIVE}, or its folder {FOLDER} with all six batches, found neither: {ADVICE}"
            )
        return iter([archive])

    def contents(self) -> Contents:
        """Raises ``DistillKacError``: it is damaged or not CIFAR-10's archive, or labels do not fit its images."""
        batches, names, warnings = self.loaded
        return Contents(
            shape=SHAPE,
            num_classes=len(CLASSES),
            labels=np.concatenate([batch.labels for batch in batches.values()]),
            held_out=np.concatenate([np.full(len(batch.labels), name == TEST) for name, batch in batches.items()]),
            units=[Unit(len(batch.labels), name) for name, batch in batches.items()],
            class_names=names,
            split=f"training images from {TRAIN[0]} .. {TRAIN[-1]}, held-out images from {TEST}",
            warnings=warnings,
        )

    def decode(self, content: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The images of the batch ``content``."""
        images, rows = self.loaded.batches[content].images, images_a_block(shape)
        return (images[start : start + rows] for start in range(0, len(images), rows))

    @cached_property
    def loaded(self) -> Loaded:
        """Everything that is in the files; 184 MB."""
        paths = [stamp.path for stamp in self.stamps()]
        if len(paths) == 1:
            path = files.join(self.root, paths[0]) if paths[0] else self.root
            packed = files.read_bytes(path)
            found, checked = _unpack(path, packed), {path: (packed, MD5)}
        else:
            places = {path.rpartition("/")[2]: files.join(self.root, path) for path in paths}
            found = {name: files.read_bytes(path) for name, path in places.items()}
            checked = {places[name]: (found[name], md5) for name, md5 in MD5_EXTRACTED.items()}
        batches = {name: _batch(f"{self.root}: {name}", found[name]) for name in (*TRAIN, TEST)}
        names = _class_names(f"{self.root}: {META}", found[META]) if META in found else CLASSES
        return Loaded(batches, names, tuple(filter(None, (_warning(path, *of) for path, of in checked.items()))))


def _unpack(path: str, packed: bytes) -> dict[str, bytes]:
    """The files in the archive that are read, by name."""
    content, found = gunzip(path, packed, lambda _: MOST_BYTES, ADVICE), {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder == FOLDER and name in (*TRAIN, TEST, META) and (file := archive.extractfile(member)):
                    if member.size > len(content):
                        raise tarfile.ReadError(f"{member.name} of {member.size:,} bytes, more than the archive has")
                    found[name] = file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DistillKacError(f"{path}: expected {ARCHIVE}, found: {one_line(error)}: {ADVICE}") from None
    missing = next((name for name in (*TRAIN, TEST) if name not in found), None)
    if missing:
        raise DistillKacError(f"{path}: expected {ARCHIVE}, found no {FOLDER}/{missing} in it: {ADVICE}")
    return found


def _warning(path: str, data: bytes, published: str) -> str:
    """What to say of a file that is not the published one, but can be read; empty if it is."""
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found == published:
        return ""
    return f"{path}: the file is not the one that CIFAR-10's authors publish: its md5 is {found}, theirs {published}"


def _class_names(name: str, packed: bytes) -> tuple[str, ...]:
    content = _unpickle(name, packed)
    found = content.get(b"label_names") if isinstance(content, dict) else None
    names = [text.decode("utf-8", "replace") for text in found or [] if isinstance(text, bytes)]
    if len(names) != len(CLASSES):
        raise DistillKacError(f"{name}: expected the names of {len(CLASSES)} classes, found {len(names)}: {ADVICE}")
    return tuple(names)


def _batch(name: str, packed: bytes) -> Batch:
    content = _unpickle(name, packed)
    try:
        pixels, labels = content[b"data"].values, content[b"labels"]
        images = pixels.reshape(-1, *SHAPE)
        batch = Batch(images, np.array(labels, np.int64).reshape(-1))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DistillKacError(f"{name}: expected 32x32 images and labels, found: {one_line(error)}: {ADVICE}") from None
    if len(batch.images) != len(batch.labels):
        found = f"{len(batch.images)} images and {len(batch.labels)} labels"
        raise DistillKacError(f"{name}: expected a label for each image, found {found}: {ADVICE}")
    return batch


def _unpickle(name: str, packed: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(packed), encoding="bytes").load()
    except DistillKacError as error:
        raise DistillKacError(f"{name}: {error}") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle may raise anything
        raise DistillKacError(f"{name}: expected a pickle, found: {one_line(error)}: {ADVICE}") from None


class _Unpickler(pickle.Unpickler):
    """Numbers, text, lists and dictionaries, and arrays of bytes. Not even numpy's own functions are called."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name that a pickle asks for."""
        if module in {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric", "_codecs"}:
            found = _STAND_INS.get(name)
            if found is not None:
                return found
        raise DistillKacError(
            f"expected numbers alone, found a pickle that asks for {module}.{name}, which may run code: nothing was "
            f"run; {ADVICE}"
        )


class _Bytes:
    """Stands for numpy's array of uint8."""

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, _, is_fortran, data = state
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _Uint8:
    """Stands for numpy's type of values."""

    def __init__(self, name: str | bytes, *_: Any) -> None:
        if name not in ("u1", b"u1"):
            raise ValueError(f"values of type {name!r} where bytes belong")

    def __setstate__(self, state: Any) -> None:
        """Bytes have no order."""


def _from_buffer(data: bytes, _: Any, shape: tuple[int, ...], order: str) -> _Bytes:
    """Stands for numpy's way to pickle arrays in pickle's protocol 5."""
    array = _Bytes()
    array.__setstate__((1, shape, None, order == "F", data))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Stands for how Python 3 writes bytes in pickle's protocol 2."""
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_STAND_INS: dict[str, Any] = {
    "_reconstruct": _Bytes,
    "ndarray": _Bytes,
    "dtype": _Uint8,
    "_frombuffer": _from_buffer,
    "encode": _encode,
}
