"""IDX files, the format of MNIST and its family (http://yann.lecun.com/exdb/mnist): one header, then bytes.

``ROOT/{train,t10k}-{images-idx3,labels-idx1}-ubyte``, each packed by gzip (``.gz``) or not; the second part is held
out. Some copies have a dot before ``idx``.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kac import files
from kac.data.source import Contents, Unit, count_classes, images_a_block
from kac.errors import DistillKacError
from kac.integrity import gunzip

UBYTE = 0x08
"""The code of the only type of values that images and labels are published in."""

PARTS = ("train", "t10k")
NAMES = {
    f"{part}-{kind}": tuple(f"{part}-{kind}{idx}-ubyte{packed}" for idx in marks for packed in ("", ".gz"))
    for part in PARTS
    for kind, marks in (("images", ("-idx3", ".idx3")), ("labels", ("-idx1", ".idx1")))
}
"""What each of the four files may be called. The first that is there is read."""

SHOWN = 8
"""How many files a message lists."""

SHA256 = {
    "MNIST": {
        "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels": "ff7bcfd416de33731a308c3f266cf351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "Fashion-MNIST": {
        "train-images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
"""Of the published files, unpacked."""


class IdxFile(NamedTuple):
    """What is in a file."""

    path: str
    values: np.ndarray  # uint8
    sha256: str  # of the file, unpacked


@dataclass(frozen=True)
class IdxSource:
    """The four files below ``root``."""

    root: str

    def stamps(self) -> Iterator[files.Stamp]:
        """Those of the four files that are there, packed or not."""
        names = {name for variants in NAMES.values() for name in variants}
        return (stamp for stamp in files.walk(self.root) if stamp.path in names)

    def contents(self) -> Contents:
        """Raises ``DistillKacError``: a file is missing, damaged or not IDX, or counts differ."""
        labels = [read_idx(self.root, f"{part}-labels", 1) for part in PARTS]
        images = [read_idx(self.root, f"{part}-images", 3) for part in PARTS]
        for part, ours, theirs in zip(PARTS, images, labels, strict=True):
            if len(ours.values) != len(theirs.values) or not ours.values.size:
                found = f"{len(ours.values)} images and {len(theirs.values)} labels"
                raise DistillKacError(f"{self.root}: expected a label for each {part} image, found {found}")
        shapes = [file.values.shape[1:] for file in images]
        if shapes[0] != shapes[1]:
            raise DistillKacError(f"{self.root}: expected images of one size, found {shapes}")
        together = np.concatenate([file.values for file in labels]).astype(np.int64)
        named = [file.path.rpartition("/")[2] for file in images]
        return Contents(
            shape=(1, *shapes[0]),
            num_classes=count_classes({file.path: file.values for file in labels}),
            labels=together,
            held_out=np.arange(len(together)) >= len(labels[0].values),
            units=[Unit(len(file.values), part) for file, part in zip(images, PARTS, strict=True)],
            split=f"training images from {named[0]}, held-out images from {named[1]}",
            warnings=_unlike_published(dict(zip(NAMES, (images[0], labels[0], images[1], labels[1]), strict=True))),
        )

    def decode(self, content: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The images of the part ``content``."""
        images = read_idx(self.root, f"{content}-images", 3).values.reshape(-1, *shape)
        rows = images_a_block(shape)
        return (images[start : start + rows] for start in range(0, len(images), rows))


def read_idx(root: str, file: str, dimensions: int) -> IdxFile:
    """The uint8 values of one of the four files in ``root``, an array with this number of ``dimensions``.

    Args:
        file: ``train-images`` or another key of ``NAMES``.

    Raises:
        DistillKacError: there is none, or it is damaged, cut short or not IDX.
    """
    there = [stamp.path for stamp in files.walk(root)]
    name = next((name for name in NAMES[file] if name in there), None)
    if name is None:
        found = ", ".join(there[:SHOWN]) + (f" and {len(there) - SHOWN:,} more" if len(there) > SHOWN else "")
        raise DistillKacError(
            f"{root}: expected a folder with {NAMES[file][0]} or {NAMES[file][1]}, found {found or 'no files in it'}. "
            "Rename the file, or give the folder that it is in"
        )
    path = files.join(root, name)
    data = files.read_bytes(path)
    if name.endswith(".gz"):
        data = gunzip(path, data, lambda head: _size(path, head, dimensions))
    expected = _size(path, data, dimensions)
    shape, start = _header(path, data, dimensions)
    if len(data) != expected:
        sides = " x ".join(f"{side:,}" for side in shape)
        raise DistillKacError(
            f"{path}: the header names {sides} values, {expected:,} bytes with it, and the file has {len(data):,}: "
            "fetch it again"
        )
    values = np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    return IdxFile(path, values, hashlib.sha256(data).hexdigest())


def _size(path: str, data: bytes, dimensions: int) -> int:
    """The size that a file should have by its header."""
    shape, start = _header(path, data, dimensions)
    return start + math.prod(shape)


def _header(path: str, data: bytes, dimensions: int) -> tuple[tuple[int, ...], int]:
    """The shape that the first bytes of a file say, and where the values begin."""
    magic, start = bytes((0, 0, UBYTE, dimensions)), 4 + 4 * dimensions
    if data[:4] != magic or len(data) < start:
        raise DistillKacError(
            f"{path}: expected IDX bytes of {dimensions} dimensions, which begin with {magic.hex()}, found "
            f"{data[:4].hex() or 'an empty file'}"
        )
    return tuple(np.frombuffer(data[4:start], ">u4").tolist()), start


def _unlike_published(found: dict[str, IdxFile]) -> tuple[str, ...]:
    """A line for each file that differs from a published set to which others of the four belong."""
    for name, published in SHA256.items():
        others = [file for file in published if found[file].sha256 != published[file]]
        if len(others) < len(published):
            return tuple(
                f"{found[file].path}: the file is not that of {name}, to which others of the four belong: its sha256 "
                f"is {found[file].sha256}, and that of the published file is {published[file]} (both unpacked)"
                for file in others
            )
    return ()
