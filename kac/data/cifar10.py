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

from kac.data.source import Contents, Source, Unit, reading
from kac.util import files
from kac.util.errors import DistillKacError
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
BATCHES = tuple(MD5_EXTRACTED)
TEST = "test_batch"
META = "batches.meta"
"""The file with the names of the classes."""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The published names, for folders without ``META``."""

SHAPE = (3, 32, 32)
MOST_BYTES = 2**30
"""The largest valid size of the uncompressed archive. The published archive has 186 MB."""

ADVICE = f"Download {ARCHIVE} again; its md5 is {MD5}."


class CifarFiles(NamedTuple):
    """The content of all files."""

    images: dict[str, np.ndarray]  # by file name: [count, 3, 32, 32], uint8
    labels: dict[str, np.ndarray]  # by file name: [count], int64
    class_names: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Cifar10Source(Source):
    """The archive ``root``, or a folder that contains the archive or its extracted files."""

    def stamps(self) -> Iterator[files.Stamp]:
        """Return the archive, or the six batches and the file with class names."""
        found = {stamp.path: stamp for stamp in files.walk(self.root)}
        for below in ("", f"{FOLDER}/"):
            if all(below + name in found for name in BATCHES):
                return iter([found[below + name] for name in (*BATCHES, META) if below + name in found])
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
        images, labels, names, warnings = self.loaded
        return Contents(
            shape=SHAPE,
            num_classes=len(CLASSES),
            labels=np.concatenate(list(labels.values())),
            held_out=np.concatenate([np.full(len(part), name == TEST) for name, part in labels.items()]),
            units=[Unit(len(part), name) for name, part in images.items()],
            class_names=names,
            split=f"training images from {BATCHES[0]} .. {BATCHES[-2]}, held-out images from {TEST}",
            warnings=warnings,
        )

    def decode(self, content: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the images of the batch ``content`` in one block."""
        yield self.loaded.images[content]

    @cached_property
    def loaded(self) -> CifarFiles:
        """The content of all files: 184 MB."""
        paths = {stamp.path.rpartition("/")[2]: self.name(stamp.path) for stamp in self.stamps()}
        content = {name: files.read_bytes(path) for name, path in paths.items()}
        published = MD5_EXTRACTED if len(paths) > 1 else dict.fromkeys(paths, MD5)
        md5s = {name: hashlib.md5(content[name], usedforsecurity=False).hexdigest() for name in published}
        warnings = tuple(
            f"{paths[name]} is not the published file of CIFAR-10. Its md5 is {md5} instead of {published[name]}."
            for name, md5 in md5s.items()
            if md5 != published[name]
        )
        if len(paths) == 1:
            content = _unpack(*paths.values(), *content.values())
        images, labels, names = {}, {}, CLASSES
        for name in BATCHES:
            with reading(f"{self.root}: {name}", "a batch of 32x32 images with labels", ADVICE):
                batch = _unpickle(content[name])
                images[name] = batch[b"data"].values.reshape(-1, *SHAPE)
                labels[name] = np.array(batch[b"labels"], np.int64).reshape(-1)
                if len(images[name]) != len(labels[name]):
                    raise ValueError(f"it has {len(images[name])} images, but {len(labels[name])} labels")
        if META in content:
            with reading(f"{self.root}: {META}", f"a file with {len(CLASSES)} class names", ADVICE):
                names = tuple(name.decode("utf-8", "replace") for name in _unpickle(content[META])[b"label_names"])
                if len(names) != len(CLASSES):
                    raise ValueError(f"it has {len(names)}")
        return CifarFiles(images, labels, names, warnings)


def _unpack(path: str, packed: bytes) -> dict[str, bytes]:
    """Return the files of the archive that are needed, by name."""
    content, found = gunzip(path, packed, lambda _: MOST_BYTES, ADVICE), {}
    with (
        reading(path, f"a complete {ARCHIVE}", ADVICE),
        tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive,
    ):
        for member in archive:
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            if folder == FOLDER and name in (*BATCHES, META) and (file := archive.extractfile(member)):
                if member.size > len(content):
                    raise ValueError(f"{member.name} announces {member.size:,} bytes, more than the archive")
                found[name] = file.read()
        for name in BATCHES:
            if name not in found:
                raise ValueError(f"it has no {FOLDER}/{name}")
    return found


def _unpickle(packed: bytes) -> Any:
    return _Unpickler(io.BytesIO(packed), encoding="bytes").load()


class _Unpickler(pickle.Unpickler):
    """Reads numbers, text, lists, dictionaries and arrays of bytes. It calls no function of another module."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a global name in a pickle."""
        known = {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric", "_codecs"}
        if module not in known or name not in _STAND_INS:
            raise ValueError(f"it asks for {module}.{name}, which may run code; nothing was run")
        return _STAND_INS[name]


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


def _from_buffer(data: bytes, _: Any, shape: tuple[int, ...], order: str) -> _Bytes:  # of numpy, for protocol 5
    array = _Bytes()
    array.__setstate__((1, shape, None, order == "F", data))
    return array


def _encode(text: str, encoding: str) -> bytes:  # of bytes, for protocol 2
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
