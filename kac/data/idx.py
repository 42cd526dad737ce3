"""IDX files, the format of MNIST and its family (http://yann.lecun.com/exdb/mnist): one header, then bytes.

``ROOT/{train,t10k}-{images-idx3,labels-idx1}-ubyte``, each packed by gzip (``.gz``) or not; the second part is held
out.
"""

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kac import files
from kac.data.source import Contents, Unit, images_a_block
from kac.errors import DistillKacError

UBYTE = 0x08
"""The code of the only type of values that images and labels are published in."""

PARTS = ("train", "t10k")


@dataclass(frozen=True)
class IdxSource:
    """The four files below ``root``."""

    root: str

    def stamps(self) -> Iterator[files.Stamp]:
        """Those of the four files that are there, packed or not."""
        names = {name for part in PARTS for name in (_images_of(part), _labels_of(part))}
        return (stamp for stamp in files.walk(self.root) if stamp.path.removesuffix(".gz") in names)

    def contents(self) -> Contents:
        """Raises ``DistillKacError``: a file is missing, cut short or not IDX, or counts differ."""
        labels = [read_idx(self.root, _labels_of(part), 1).astype(np.int64) for part in PARTS]
        images = [read_idx(self.root, _images_of(part), 3) for part in PARTS]
        for part, ours, theirs in zip(PARTS, images, labels, strict=True):
            if len(ours) != len(theirs) or not len(ours):
                found = f"{len(ours)} images and {len(theirs)} labels"
                raise DistillKacError(f"{self.root}: expected a label for each {part} image, found {found}")
        if images[0].shape[1:] != images[1].shape[1:]:
            raise DistillKacError(f"{self.root}: expected images of one size, found {[i.shape[1:] for i in images]}")
        together = np.concatenate(labels)
        return Contents(
            shape=(1, *images[0].shape[1:]),
            num_classes=1 + int(together.max()),
            labels=together,
            held_out=np.arange(len(together)) >= len(labels[0]),
            units=[Unit(len(ours), part) for ours, part in zip(images, PARTS, strict=True)],
        )

    def decode(self, content: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The images of the part ``content``."""
        images = read_idx(self.root, _images_of(content), 3).reshape(-1, *shape)
        rows = images_a_block(shape)
        return (images[start : start + rows] for start in range(0, len(images), rows))


def read_idx(root: str, name: str, dimensions: int) -> np.ndarray:
    """The uint8 values of ``ROOT/name`` or ``ROOT/name.gz``, an array of so many ``dimensions``.

    Raises:
        DistillKacError: there is neither, or it is cut short or not IDX.
    """
    path, data = _content(root, name)
    shape, start = _header(path, data, dimensions)
    found, expected = len(data) - start, math.prod(shape)
    if found != expected:
        raise DistillKacError(f"{path}: expected {expected} bytes for {shape} values, found {found}: fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _images_of(part: str) -> str:
    return f"{part}-images-idx3-ubyte"


def _labels_of(part: str) -> str:
    return f"{part}-labels-idx1-ubyte"


def _content(root: str, name: str) -> tuple[str, bytes]:
    plain, packed = files.join(root, name), files.join(root, f"{name}.gz")
    if files.exists(plain):
        return plain, files.read_bytes(plain)
    try:
        return packed, gzip.decompress(files.read_bytes(packed))
    except FileNotFoundError:
        raise DistillKacError(f"{root}: expected {name} or {name}.gz, found neither") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DistillKacError(f"{packed}: expected a gzip file, found: {error}: fetch it again") from None


def _header(path: str, data: bytes, dimensions: int) -> tuple[tuple[int, ...], int]:
    """The shape that the first bytes of a file say, and where the values begin."""
    magic, start = bytes((0, 0, UBYTE, dimensions)), 4 + 4 * dimensions
    if data[:4] != magic or len(data) < start:
        raise DistillKacError(
            f"{path}: expected IDX bytes of {dimensions} dimensions, which begin with {magic.hex()}, found "
            f"{data[:4].hex() or 'an empty file'}"
        )
    return tuple(np.frombuffer(data[4:start], ">u4").tolist()), start
