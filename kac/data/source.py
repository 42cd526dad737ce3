"""What a kind of files must tell so that its images can be decoded into the cache, by one process or by many."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from kac.util.errors import DistillKacError
from kac.util.files import Stamp

BLOCK_BYTES = 2**24
"""Decoded images are handed over in blocks of about this size, and of one image at least."""


class Unit(NamedTuple):
    """Images that one task decodes."""

    images: int  # how many
    content: Any  # what the source's ``decode`` needs to find them


class Contents(NamedTuple):
    """What is in the files, without the images themselves."""

    shape: tuple[int, ...]  # channels, height, width
    num_classes: int
    labels: np.ndarray  # [count], int64 in 0 .. num_classes - 1
    held_out: np.ndarray | None  # [count] bool; None: every fifth image of each class
    units: list[Unit]  # all images in their order
    class_names: tuple[str, ...] = ()  # by number; empty: the classes have none
    split: str = ""  # which images are held out, and how that was decided
    warnings: tuple[str, ...] = ()  # what a person should know of the files


class Source(Protocol):
    """Labelled images in files. It travels to the processes that decode."""

    def stamps(self) -> Iterator[Stamp]:
        """The files that are read: the decoded images are kept as long as these stay the same."""
        ...

    def contents(self) -> Contents:
        """What is in the files.

        Raises:
            DistillKacError: files are missing or damaged, or do not fit together.
        """
        ...

    def decode(self, content: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The images of one unit, uint8, in blocks [rows, *shape].

        Raises:
            DistillKacError: an image is damaged or of another shape; the message names it.
        """
        ...


def images_a_block(shape: tuple[int, ...]) -> int:
    """How many images of ``shape`` make a block."""
    return max(1, BLOCK_BYTES // int(np.prod(shape)))


def count_classes(labels: Mapping[str, np.ndarray]) -> int:
    """The number of classes of integer labels 0 .. n - 1, before anything is allocated by it.

    Args:
        labels: of the images in each file, [images], of any integer type.

    Raises:
        DistillKacError: a label is negative, or larger than n - 1 can be with so few images.
    """
    images = sum(map(len, labels.values()))
    found = 0
    for name, values in labels.items():
        if not len(values):
            continue
        least, most = int(values.min()), int(values.max())
        if least < 0:
            raise DistillKacError(
                f"{name}: found the label {least}, expected classes from 0 on. Correct the labels, or move the file "
                "away if its images have none, which Hugging Face marks by -1"
            )
        if most >= images:
            raise DistillKacError(
                f"{name}: found the label {most} in a dataset of {images:,} images, where some class up to {most} has "
                "no image. Number the classes from 0 without gaps"
            )
        found = max(found, most + 1)
    return found


def check_labels(root: str, labels: np.ndarray, num_classes: int, held_out: np.ndarray) -> None:
    """Raise ``DistillKacError`` unless labels are classes, each has training images, and some images are held out."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise DistillKacError(
            f"{root}: expected labels in 0 .. {num_classes - 1}, found {wrong[0]}: correct the labels"
        )
    counts = np.bincount(labels[~held_out], minlength=num_classes)
    if not counts.all():
        raise DistillKacError(
            f"{root}: expected training images of each class 0 .. {num_classes - 1}, found none of class "
            f"{int(np.argmin(counts))}: number the classes from 0 without gaps"
        )
    if not held_out.any():
        raise DistillKacError(
            f"{root}: expected 5 images of a class or more, so that every fifth can be held out, found {counts.max()}"
        )
