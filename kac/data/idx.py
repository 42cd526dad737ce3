"""IDX files, the format of MNIST and its family (http://yann.lecun.com/exdb/mnist): one header, then bytes."""

import gzip
import math
import zlib
from typing import NamedTuple

import numpy as np

from kac import files
from kac.data.splits import Dataset, of_bytes
from kac.errors import DistillKacError

UBYTE = 0x08
"""The only type of values that images and labels are published in."""

PARTS = ("train", "t10k")


class Header(NamedTuple):
    """What the first bytes of a file say."""

    size: int  # of the header, in bytes
    shape: tuple[int, ...]


def idx(root: str) -> Dataset:
    """``ROOT/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]``: the second part is held out.

    Raises:
        DistillKacError: a file is missing, truncated or not IDX, or counts of images and labels differ.
    """
    train, held_out = (_part(root, part) for part in PARTS)
    return of_bytes(train, held_out)


def _part(root: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = read(root, f"{part}-images-idx3-ubyte", 3)
    labels = read(root, f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise DistillKacError(f"{root}: expected a label for each {part} image, found {len(images)} and {len(labels)}")
    return images[:, None], labels.astype(np.int64)


def read(root: str, name: str, dimensions: int) -> np.ndarray:
    """The uint8 values of ``ROOT/name`` or ``ROOT/name.gz``, in their shape of so many ``dimensions``."""
    path, data = _content(root, name)
    header = _header(path, data, dimensions)
    found, expected = len(data) - header.size, math.prod(header.shape)
    if found != expected:
        raise DistillKacError(
            f"{path}: expected {expected} bytes after the header {header.shape}, found {found}: copy it again"
        )
    return np.frombuffer(data, np.uint8, offset=header.size).reshape(header.shape)


def _content(root: str, name: str) -> tuple[str, bytes]:
    plain, packed = files.join(root, name), files.join(root, f"{name}.gz")
    if files.exists(plain):
        return plain, files.read_bytes(plain)
    try:
        return packed, gzip.decompress(files.read_bytes(packed))
    except FileNotFoundError:
        raise DistillKacError(f"{root}: expected {name} or {name}.gz, found neither") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DistillKacError(f"{packed}: expected a gzip file, found: {error}: copy it again") from None


def _header(path: str, data: bytes, dimensions: int) -> Header:
    magic = bytes((0, 0, UBYTE, dimensions))
    size = 4 + 4 * dimensions
    if data[:4] != magic or len(data) < size:
        raise DistillKacError(
            f"{path}: expected IDX bytes of {dimensions} dimensions ({magic.hex()}), found {data[:4].hex()}"
        )
    return Header(size, tuple(np.frombuffer(data[4:size], ">u4").tolist()))
