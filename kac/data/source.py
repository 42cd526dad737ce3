"""The interface of image files: what a kind of files must provide so that its images can be decoded into the cache."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from kac.util.errors import DistillKacError
from kac.util.files import Stamp

BLOCK_BYTES = 2**24
"""Approximate size of a block of decoded images. A block holds at least one image."""


class Unit(NamedTuple):
    """Images that one task decodes."""

    images: int  # their number
    content: Any  # what ``Source.decode`` needs to find them


class Contents(NamedTuple):
    """Everything in the files except the images."""

    shape: tuple[int, ...]  # channels, height, width
    num_classes: int
    labels: np.ndarray  # [count], int64 in 0 .. num_classes - 1
    held_out: np.ndarray | None  # [count] bool; None: hold out every fifth image of each class
    units: list[Unit]  # all images, in order
    class_names: tuple[str, ...] = ()  # by label; empty if the classes have no names
    split: str = ""  # which images are held out, and why
    warnings: tuple[str, ...] = ()  # messages about the files for the user


class Source(Protocol):
    """Labelled images in files. It is pickled and sent to the processes that decode."""

    def stamps(self) -> Iterator[Stamp]:
        """Yield the files to read. Cached images stay valid as long as these stamps do not change."""
        ...

    def contents(self) -> Contents:
        """Return everything in the files except the images.

        Raises:
            DistillKacError: files are missing, damaged or inconsistent.
        """
        ...

    def decode(self, content: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the images of one unit, uint8, in blocks [rows, *shape].

        Raises:
            DistillKacError: an image is damaged or has another shape; the message names it.
        """
        ...


def images_per_block(shape: tuple[int, ...]) -> int:
    """Return the number of images of ``shape`` in a block."""
    return max(1, BLOCK_BYTES // int(np.prod(shape)))


def count_classes(labels: Mapping[str, np.ndarray]) -> int:
    """Return the number of classes of the integer labels 0 .. n - 1, after checking that it is plausible.

    Args:
        labels: the labels of each file, [images], of any integer type.

    Raises:
        DistillKacError: a label is negative, or so large that some class has no image.
    """
    images = sum(map(len, labels.values()))
    num_classes = 0
    for name, values in labels.items():
        if not len(values):
            continue
        least, most = int(values.min()), int(values.max())
        if least < 0:
            raise DistillKacError(
                f"{name} has the label {least}, but labels start at 0. Correct the labels, or move the file away if "
                "its images have no classes (Hugging Face uses -1 for no class)."
            )
        if most >= images:
            raise DistillKacError(
                f"{name} has the label {most}, but there are only {images:,} images, so some class has none. Number "
                "the classes from 0 without gaps."
            )
        num_classes = max(num_classes, most + 1)
    return num_classes


def check_labels(root: str, labels: np.ndarray, num_classes: int, held_out: np.ndarray) -> None:
    """Raise ``DistillKacError`` unless labels are in range, each class has training images and some are held out."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise DistillKacError(
            f"{root} has the label {wrong[0]}, but labels must be in 0 .. {num_classes - 1}. Correct the labels."
        )
    counts = np.bincount(labels[~held_out], minlength=num_classes)
    if not counts.all():
        raise DistillKacError(
            f"{root} has no training images of class {int(np.argmin(counts))}, one of the classes "
            f"0 .. {num_classes - 1}. Number the classes from 0 without gaps."
        )
    if not held_out.any():
        raise DistillKacError(
            f"{root} has at most {counts.max()} images per class, so no fifth image can be held out. Add images, so "
            "that a class has at least 5, or add a test split."
        )
