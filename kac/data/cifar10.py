"""CIFAR-10 in the archive that its authors publish for Python: pickles, which are read without running what they say.

https://www.cs.toronto.edu/~kriz/cifar.html: ``cifar-10-python.tar.gz``, or its extracted folder. The test batch is held
out.
"""

import io
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from kac import files
from kac.data.source import Contents, Unit, images_a_block
from kac.errors import DistillKacError, one_line

ARCHIVE = "cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"
SHAPE = (3, 32, 32)
ADVICE = f"fetch {ARCHIVE} again, its md5 is {MD5}"


class Batch(NamedTuple):
    """One of its files."""

    images: np.ndarray  # [count, 3, 32, 32], uint8
    labels: np.ndarray  # [count], int64


@dataclass(frozen=True)
class Cifar10Source:
    """The archive ``root``, or a folder that holds the archive or its extracted files."""

    root: str

    def stamps(self) -> Iterator[files.Stamp]:
        """The archive, or the six batches."""
        batches = (*TRAIN, TEST)
        found = [stamp for stamp in files.walk(self.root) if stamp.path.rpartition("/")[2] in ("", ARCHIVE, *batches)]
        folders = [[stamp for stamp in found if stamp.path in _paths(batches, below)] for below in ("", f"{FOLDER}/")]
        extracted = next((stamps for stamps in folders if len(stamps) == len(batches)), None)
        archive = [stamp for stamp in found if stamp.path in ("", ARCHIVE)]
        if not extracted and not archive:
            raise DistillKacError(f"{self.root}: expected {ARCHIVE} or its folder {FOLDER}, found neither: {ADVICE}")
        return iter(extracted or archive)

    def contents(self) -> Contents:
        """Raises ``DistillKacError``: it is not the published archive, or labels do not fit its images."""
        labels = [batch.labels for batch in self.batches.values()]
        held_out = [np.full(len(batch.labels), name == TEST) for name, batch in self.batches.items()]
        units = [Unit(len(batch.labels), name) for name, batch in self.batches.items()]
        return Contents(SHAPE, 10, np.concatenate(labels), np.concatenate(held_out), units)

    def decode(self, content: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The images of the batch ``content``."""
        images, rows = self.batches[content].images, images_a_block(shape)
        return (images[start : start + rows] for start in range(0, len(images), rows))

    @cached_property
    def batches(self) -> dict[str, Batch]:
        """The six batches by name; 184 MB."""
        paths = [stamp.path for stamp in self.stamps()]
        packed = _read_archive(self.root, paths[0]) if len(paths) == 1 else _read_folder(self.root, paths)
        return {name: _batch(f"{self.root}: {name}", packed[name]) for name in (*TRAIN, TEST)}


def _paths(names: tuple[str, ...], below: str) -> list[str]:
    return [f"{below}{name}" for name in names]


def _read_folder(root: str, paths: list[str]) -> dict[str, bytes]:
    return {path.rpartition("/")[2]: files.read_bytes(files.join(root, path)) for path in paths}


def _read_archive(root: str, path: str) -> dict[str, bytes]:
    path = files.join(root, path) if path else root
    batches = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(files.read_bytes(path)), mode="r:gz") as archive:
            for name in (*TRAIN, TEST):
                file = archive.extractfile(f"{FOLDER}/{name}")
                batches[name] = file.read() if file else b""
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise DistillKacError(f"{path}: expected {ARCHIVE}, found: {one_line(error)}: {ADVICE}") from None
    return batches


def _batch(name: str, packed: bytes) -> Batch:
    content = _unpickle(name, packed)
    try:
        pixels, labels = content[b"data"].values, content[b"labels"]
        images = pixels.reshape(-1, *SHAPE)
        batch = Batch(images, np.array(labels, np.int64).reshape(-1))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
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
