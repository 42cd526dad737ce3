"""The interface of image files: what a kind of files must provide so that its images can be decoded into the cache."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kac.util import files
from kac.util.errors import DistillKacError, one_line


class Unit(NamedTuple):
    """Images that one task decodes."""

    images: int  # number of images
    content: Any  # argument of ``Source.decode``


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


@dataclass(frozen=True)
class Source(ABC):
    """Labelled images in files. It is pickled and sent to the processes that decode.

    All other fields of a subclass are options of ``DataConfig`` with the same names.
    """

    root: str  # absolute path or s3:// URI of a file or folder

    @abstractmethod
    def stamps(self) -> Iterator[files.Stamp]:
        """Yield the files to read. Cached images stay valid as long as these stamps do not change."""

    @abstractmethod
    def contents(self) -> Contents:
        """Return everything in the files except the images.

        Raises:
            DistillKacError: files are missing, damaged or inconsistent.
        """

    @abstractmethod
    def decode(self, content: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the images of one unit, uint8, in blocks [rows, *shape].

        Raises:
            DistillKacError: an image is damaged or has another shape; the message names it.
        """

    def name(self, path: str) -> str:
        """Return the full path of ``path`` below the root; an empty path is the root."""
        return files.join(self.root, path) if path else self.root


@contextmanager
def reading(name: str, kind: str, advice: str = "Download it again.") -> Iterator[None]:
    """Convert any error of a decoder to a ``DistillKacError`` that names the file, its expected kind and the reason."""
    try:
        yield
    except DistillKacError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        if isinstance(error, OSError) and error.errno is not None:  # of the disk or S3; those of decoders have no errno
            raise
        raise DistillKacError(f"{name} is not {kind} ({one_line(error).rstrip('.')}). {advice}") from None


def count_classes(labels: Mapping[str, np.ndarray]) -> int:
    """Return the number of classes of integer labels 0 .. n - 1.

    Args:
        labels: the labels of each file, [images], of any integer type.

    Raises:
        DistillKacError: a label is negative, or so large that a class has no image.
    """
    images, num_classes = sum(map(len, labels.values())), 0
    for name, values in labels.items():
        for label in (int(values.min()), int(values.max())) if len(values) else ():
            if not 0 <= label < images:
                raise DistillKacError(
                    f"{name} has the label {label}, but labels of {images:,} images must be in 0 .. {images - 1}. "
                    "Number the classes from 0 without gaps. Move files without labels away."
                )
            num_classes = max(num_classes, label + 1)
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
