"""IDX files, the format of MNIST and its family (http://yann.lecun.com/exdb/mnist): a header, then bytes.

The files are ``ROOT/{train,t10k}-{images-idx3,labels-idx1}-ubyte``, each with or without gzip (``.gz``). The t10k part
is held out. Some copies have a dot before ``idx``.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kac.data.source import Contents, Source, Unit, count_classes, reading
from kac.util import files
from kac.util.errors import DistillKacError
from kac.util.integrity import gunzip
from kac.util.text import shorten

UBYTE = 0x08
"""The code of unsigned bytes, the only type in which images and labels are published."""

PARTS = ("train", "t10k")
DIMENSIONS = {"labels": 1, "images": 3}
NAMES = {
    f"{part}-{kind}": [f"{part}-{kind}{dot}idx{size}-ubyte{packed}" for dot in "-." for packed in ("", ".gz")]
    for kind, size in DIMENSIONS.items()
    for part in PARTS
}
"""The possible names of each of the four files. The first that exists is read."""

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
"""Checksums of the published files, uncompressed."""


class IdxFile(NamedTuple):
    """The content of a file."""

    path: str
    values: np.ndarray  # uint8
    sha256: str  # of the uncompressed file


@dataclass(frozen=True)
class IdxSource(Source):
    """The four files in the folder ``root``."""

    def stamps(self) -> Iterator[files.Stamp]:
        """Yield the files that exist."""
        names = {name for variants in NAMES.values() for name in variants}
        return (stamp for stamp in files.walk(self.root) if stamp.path in names)

    def contents(self) -> Contents:
        """Read the labels and the shape of the images.

        Raises:
            DistillKacError: a file is missing, damaged or not IDX, or the files do not match.
        """
        found = {file: self._read(file) for file in NAMES}
        labels, images = ([found[f"{part}-{kind}"] for part in PARTS] for kind in DIMENSIONS)
        for part, part_images, part_labels in zip(PARTS, images, labels, strict=True):
            if len(part_images.values) != len(part_labels.values) or not part_images.values.size:
                counts = f"{len(part_images.values)} images and {len(part_labels.values)} labels"
                raise DistillKacError(
                    f"{self.root}: the {part} files have {counts}. Give files with a label for each image."
                )
        shape, other = (file.values.shape[1:] for file in images)
        if shape != other:
            raise DistillKacError(
                f"{self.root}: the train and t10k images have different sizes, {shape[1]}x{shape[0]} and "
                f"{other[1]}x{other[0]} pixels. Give files with images of one size."
            )
        all_labels = np.concatenate([file.values for file in labels]).astype(np.int64)
        names = [file.path.rpartition("/")[2] for file in images]
        return Contents(
            shape=(1, *shape),
            num_classes=count_classes({file.path: file.values for file in labels}),
            labels=all_labels,
            held_out=np.arange(len(all_labels)) >= len(labels[0].values),
            units=[Unit(len(file.values), part) for file, part in zip(images, PARTS, strict=True)],
            split=f"training images from {names[0]}, held-out images from {names[1]}",
            warnings=_unlike_published(found),
        )

    def decode(self, content: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the images of the part ``content`` in one block."""
        yield self._read(f"{content}-images").values.reshape(-1, *shape)

    def _read(self, file: str) -> IdxFile:
        """Read one of the four files, a key of ``NAMES``."""
        found = [stamp.path for stamp in files.walk(self.root)]
        name = next((name for name in NAMES[file] if name in found), None)
        if name is None:
            others = f"only {shorten(found, 8)}" if found else "no files"
            raise DistillKacError(
                f"{self.root} has no {NAMES[file][0]} or {NAMES[file][1]}, {others}. Rename the file, or give the "
                "folder that contains it."
            )
        path, dimensions = self.name(name), DIMENSIONS[file.partition("-")[2]]
        start, magic = 4 + 4 * dimensions, bytes((0, 0, UBYTE, dimensions))

        def read_shape(data: bytes) -> list[int]:
            if data[:4] != magic or len(data) < start:
                raise ValueError(f"it begins with {data[:4].hex() or 'nothing'} instead of {magic.hex()}")
            return np.frombuffer(data[4:start], ">u4").tolist()

        data = files.read_bytes(path)
        with reading(path, f"an IDX file of bytes with {dimensions} dimensions"):
            if name.endswith(".gz"):
                data = gunzip(path, data, lambda head: start + math.prod(read_shape(head)))
            shape = read_shape(data)
            if len(data) != start + math.prod(shape):
                sides = " x ".join(f"{side:,}" for side in shape)
                raise ValueError(f"it has {len(data):,} bytes, but its header announces {sides} values")
        values = np.frombuffer(data, np.uint8, offset=start).reshape(shape)
        return IdxFile(path, values, hashlib.sha256(data).hexdigest())


def _unlike_published(found: dict[str, IdxFile]) -> tuple[str, ...]:
    """Return a warning per file that differs from a published set, if the set includes others of the four files."""
    for name, published in SHA256.items():
        others = [file for file in published if found[file].sha256 != published[file]]
        if len(others) < len(published):
            return tuple(
                f"{found[file].path} is not the published file of {name}, but others of the four are. Its sha256 is "
                f"{found[file].sha256}, and that of the published file is {published[file]} (both uncompressed)."
                for file in others
            )
    return ()
