"""CIFAR-10 from the Python archive of its authors. Its pickles are read without running any code in them.

``ROOT`` is ``cifar-10-python.tar.gz`` (https://www.cs.toronto.edu/~kriz/cifar.html), or its extracted folder. The test
batch is held out.
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

from kac.data.source import Contents, Unit, images_per_block
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
"""Checksums of the published files. Extracted files have no checksum inside them."""

FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"
META = "batches.meta"
"""The file with the names of the classes."""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The published names, for folders without ``META``."""

SHAPE = (3, 32, 32)
MOST_BYTES = 2**30
"""The largest valid size of the uncompressed archive. The published archive has 186 MB."""

ADVICE = f"Download {ARCHIVE} again; its md5 is {MD5}."


class CifarBatch(NamedTuple):
    """The content of one batch file."""

    images: np.ndarray  # [count, 3, 32, 32], uint8
    labels: np.ndarray  # [count], int64


class CifarFiles(NamedTuple):
    """The content of all files."""

    batches: dict[str, CifarBatch]  # by file name
    class_names: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Cifar10Source:
    """The archive ``root``, or a folder that contains the archive or its extracted files."""

    root: str

    def stamps(self) -> Iterator[files.Stamp]:
        """Return the archive, or the six batches and the file with class names."""
        found = {stamp.path: stamp for stamp in files.walk(self.root)}
        for below in ("", f"{FOLDER}/"):
            if all(f"{below}{name}" in found for name in (*TRAIN, TEST)):
                return iter([found[f"{below}{name}"] for name in (*TRAIN, TEST, META) if f"{below}{name}" in found])
        archive = next((stamp for path, stamp in found.items() if path in {"", ARCHIVE}), None)
        if archive is None:
            raise DistillKacError(
                f"{self.root} contains neither {ARCHIVE} nor its folder {FOLDER} with all six batches. {ADVICE}"
            )
        return iter([archive])

    def contents(self) -> Contents:
        """Read all files.

        Raises:
            DistillKacError: the files are missing, damaged or not those of CIFAR-10.
        """
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
        """Yield the images of the batch ``content``, in blocks."""
        images, rows = self.loaded.batches[content].images, images_per_block(shape)
        return (images[start : start + rows] for start in range(0, len(images), rows))

    @cached_property
    def loaded(self) -> CifarFiles:
        """The content of all files: 184 MB."""
        paths = [stamp.path for stamp in self.stamps()]
        if len(paths) == 1:
            path = files.join(self.root, paths[0]) if paths[0] else self.root
            packed = files.read_bytes(path)
            content, md5s = _unpack(path, packed), {path: (packed, MD5)}
        else:
            locations = {path.rpartition("/")[2]: files.join(self.root, path) for path in paths}
            content = {name: files.read_bytes(path) for name, path in locations.items()}
            md5s = {locations[name]: (content[name], md5) for name, md5 in MD5_EXTRACTED.items()}
        batches = {name: _parse_batch(f"{self.root}: {name}", content[name]) for name in (*TRAIN, TEST)}
        names = _parse_class_names(f"{self.root}: {META}", content[META]) if META in content else CLASSES
        return CifarFiles(batches, names, tuple(filter(None, (_warning(path, *file) for path, file in md5s.items()))))


def _unpack(path: str, packed: bytes) -> dict[str, bytes]:
    """Return the files of the archive that are needed, by name."""
    content, found = gunzip(path, packed, lambda _: MOST_BYTES, ADVICE), {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder == FOLDER and name in (*TRAIN, TEST, META) and (file := archive.extractfile(member)):
                    if member.size > len(content):
                        raise tarfile.ReadError(f"{member.name} announces {member.size:,} bytes, more than the archive")
                    found[name] = file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DistillKacError(f"{path} is not a complete {ARCHIVE} ({one_line(error)}). {ADVICE}") from None
    missing = next((name for name in (*TRAIN, TEST) if name not in found), None)
    if missing:
        raise DistillKacError(f"{path} is not a complete {ARCHIVE}: it has no {FOLDER}/{missing}. {ADVICE}")
    return found


def _warning(path: str, data: bytes, published: str) -> str:
    """Return a warning if a file differs from the published one; else an empty text."""
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if md5 == published:
        return ""
    return f"{path} is not the published file of CIFAR-10. Its md5 is {md5} instead of {published}."


def _parse_class_names(name: str, packed: bytes) -> tuple[str, ...]:
    content = _unpickle(name, packed)
    values = content.get(b"label_names") if isinstance(content, dict) else None
    names = [text.decode("utf-8", "replace") for text in values or [] if isinstance(text, bytes)]
    if len(names) != len(CLASSES):
        raise DistillKacError(f"{name} should have {len(CLASSES)} class names, but has {len(names)}. {ADVICE}")
    return tuple(names)


def _parse_batch(name: str, packed: bytes) -> CifarBatch:
    content = _unpickle(name, packed)
    try:
        pixels, labels = content[b"data"].values, content[b"labels"]
        images = pixels.reshape(-1, *SHAPE)
        batch = CifarBatch(images, np.array(labels, np.int64).reshape(-1))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DistillKacError(f"{name} has no 32x32 images with labels ({one_line(error)}). {ADVICE}") from None
    if len(batch.images) != len(batch.labels):
        raise DistillKacError(f"{name} has {len(batch.images)} images, but {len(batch.labels)} labels. {ADVICE}")
    return batch


def _unpickle(name: str, packed: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(packed), encoding="bytes").load()
    except DistillKacError as error:
        raise DistillKacError(f"{name} {error}") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle may raise anything
        raise DistillKacError(f"{name} is not a readable pickle ({one_line(error)}). {ADVICE}") from None


class _Unpickler(pickle.Unpickler):
    """Reads numbers, text, lists, dictionaries and arrays of bytes. It calls no function of another module."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a global name in a pickle."""
        if module in {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric", "_codecs"}:
            stand_in = _STAND_INS.get(name)
            if stand_in is not None:
                return stand_in
        raise DistillKacError(
            f"asks for {module}.{name}, which may run code, while batches contain only numbers. Nothing was run. "
            f"{ADVICE}"
        )


class _Bytes:
    """Stand-in for numpy's array of uint8."""

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, _, is_fortran, data = state
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _Uint8:
    """Stand-in for numpy's dtype."""

    def __init__(self, name: str | bytes, *_: Any) -> None:
        if name not in ("u1", b"u1"):
            raise ValueError(f"the type of the values is {name!r}, not bytes")

    def __setstate__(self, state: Any) -> None:
        """Ignore the byte order, which bytes do not have."""


def _from_buffer(data: bytes, _: Any, shape: tuple[int, ...], order: str) -> _Bytes:
    """Stand-in for the function that numpy uses in pickle protocol 5."""
    array = _Bytes()
    array.__setstate__((1, shape, None, order == "F", data))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Stand-in for the function that encodes bytes in pickle protocol 2."""
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
