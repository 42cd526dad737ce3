"""Datasets with two splits, and the interface of sources. A source is a set of files that contain labelled images."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kac.util import files
from kac.util.errors import DistillKacError, one_line
from kac.util.options import Options

EVERY_FIFTH = "every fifth image of each class is held out"


class DataDescription(Options):
    """Facts about a dataset that are known without reading its images."""

    sample_shape: tuple[int, ...]
    num_classes: int
    class_frequencies: tuple[float, ...]  # fraction of the training images in each class
    train: int  # number of training images
    held_out: int  # number of held-out images
    sha256: str  # hash of the content of both splits
    class_names: tuple[str, ...] = ()  # by label; empty if the classes have no names
    split: str = ""  # which images are held out, and why
    warnings: tuple[str, ...] = ()  # warnings for the user about the files


class LabelledImages(NamedTuple):
    """Some rows of a dataset."""

    images: Tensor  # [rows, *sample], float32: images and points in [-1, 1], or latents
    labels: Tensor  # [rows], int64 in 0 .. num_classes - 1


class Split(Protocol):
    """The training images or the held-out images of a dataset."""

    @property
    def labels(self) -> Tensor:
        """The labels of all rows, [len], int64."""
        ...

    def __len__(self) -> int: ...

    def rows(self, ids: Tensor) -> LabelledImages:
        """Return the rows ``ids`` [rows], int64 in 0 .. len - 1, in the order given, on the CPU."""
        ...


@dataclass(frozen=True)
class Dataset:
    """A labelled dataset. Models are trained only on ``train``, and evaluated on both splits."""

    description: DataDescription
    train: Split
    held_out: Split


class Unit(NamedTuple):
    """The images that one task decodes."""

    images: int  # number of images
    content: Any  # argument of ``Source.decode``


class Contents(NamedTuple):
    """Everything in the files except the images."""

    shape: tuple[int, ...]  # channels, height, width
    num_classes: int
    labels: np.ndarray  # [count], int64 in 0 .. num_classes - 1
    held_out: np.ndarray | None  # [count] bool; None: hold out every fifth image of each class
    units: list[Unit]  # units of all images, in the order of ``labels``
    split: str  # which images are held out, and why
    class_names: tuple[str, ...] = ()  # by label; empty if the classes have no names
    warnings: tuple[str, ...] = ()  # warnings for the user about the files
    sha256: str = ""  # identity of the dataset; empty: the hash of its content


@dataclass(frozen=True)
class Source(ABC):
    """Labelled images in files. A source is pickled and sent to the processes that decode its images.

    A subclass may add fields. Each field is set from the option of ``DataConfig`` that has the field's name.
    All methods raise ``DistillKacError`` if a file is missing, damaged or inconsistent. The message names the file.
    """

    root: str  # absolute path or s3:// URI of a file or folder
    dtype: ClassVar[str] = "uint8"  # of the blocks and of the cache: uint8 pixels, or float32 latents

    @abstractmethod
    def stamps(self) -> Iterator[files.Stamp]:
        """Yield the stamps of the files to read. Cached images stay valid until a stamp changes."""

    @abstractmethod
    def contents(self) -> Contents:
        """Return everything in the files except the images."""

    @abstractmethod
    def decode(self, content: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the images of one unit in blocks [rows, *shape] of the type ``dtype``."""

    def name(self, path: str) -> str:
        """Return the full path of ``path``, which is relative to the root. An empty path means the root."""
        return files.join(self.root, path) if path else self.root


@contextmanager
def reading(name: str, kind: str, advice: str = "Download it again.") -> Iterator[None]:
    """Convert any error of a decoder to a ``DistillKacError`` that names the file, its expected kind and the reason."""
    try:
        yield
    except DistillKacError:
        raise
    except Exception as error:  # a decoder may raise any error for a damaged file
        if isinstance(error, OSError) and error.errno is not None:  # from the disk or S3; decoders set no errno
            raise
        raise DistillKacError(f"{name} is not {kind} ({one_line(error).rstrip('.')}). {advice}") from None


def count_classes(labels: Mapping[str, np.ndarray]) -> int:
    """Return the number of classes n. ``labels`` has each file's labels 0 .. n - 1: [images], of any integer type.

    Raises:
        DistillKacError: a label is negative, or so large that a class has no image.
    """
    images, num_classes = sum(map(len, labels.values())), 0
    for name, values in labels.items():
        for label in (int(values.min()), int(values.max())) if len(values) else ():
            if not 0 <= label < images:
                raise DistillKacError(
                    f"{name} has the label {label}, but labels of {images:,} images must be in 0 .. {images - 1}. "
                    "Number the classes from 0 without gaps. Remove files without labels."
                )
            num_classes = max(num_classes, label + 1)
    return num_classes


def check_labels(root: str, labels: np.ndarray, num_classes: int, held_out: np.ndarray) -> None:
    """Raise ``DistillKacError`` if a label is out of range, a class lacks training images, or no image is held out."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        problem = f"the label {wrong[0]}, but labels must be in 0 .. {num_classes - 1}. Correct the labels"
        raise DistillKacError(f"{root} has {problem}.")
    counts = np.bincount(labels[~held_out], minlength=num_classes)
    if not counts.all():
        problem = f"no training images of class {int(np.argmin(counts))}, one of the classes 0 .. {num_classes - 1}"
        raise DistillKacError(f"{root} has {problem}. Number the classes from 0 without gaps.")
    if not held_out.any():
        problem = f"at most {counts.max()} images per class, so no fifth image can be held out"
        raise DistillKacError(f"{root} has {problem}. Add images until a class has at least 5, or add a test split.")


def every_nth_of_each_class(labels: Tensor, n: int = 5) -> Tensor:
    """Return a mask [count] bool that selects every n-th image of each class. The mask is the same on every machine."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():  # type: ignore[no-untyped-call]
        chosen[torch.nonzero(labels == label)[n - 1 :: n]] = True
    return chosen


def all_rows(split: Split) -> LabelledImages:
    """Return all rows of a split. They must fit into memory."""
    return split.rows(torch.arange(len(split)))
