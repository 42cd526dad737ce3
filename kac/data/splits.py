"""A dataset: its description, and two splits with random access."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kac.util.fingerprint import fingerprint
from kac.util.options import Options

HELD_OUT_EVERY = 5  # of each class, for datasets without their own split
EVERY_FIFTH = "every fifth image of each class is held out"


class DataDescription(Options):
    """Facts about a dataset that are known without reading its images."""

    sample_shape: tuple[int, ...]
    num_classes: int
    class_frequencies: tuple[float, ...]  # of the training images; they sum to 1
    train: int  # number of training images
    held_out: int  # number of held-out images
    sha256: str  # of the content of both splits
    class_names: tuple[str, ...] = ()  # by label; empty if the classes have no names
    split: str = ""  # which images are held out, and why
    warnings: tuple[str, ...] = ()  # messages for the user about the files


class LabelledImages(NamedTuple):
    """Some rows of a dataset."""

    images: Tensor  # [rows, *sample], float32 in [-1, 1]
    labels: Tensor  # [rows], int64 in 0 .. num_classes - 1


class Split(Protocol):
    """The training images or the held-out images of a dataset."""

    def __len__(self) -> int: ...

    def rows(self, ids: Tensor) -> LabelledImages:
        """Return the rows ``ids`` [rows], int64 in 0 .. len - 1, in this order, on the CPU."""
        ...


@dataclass(frozen=True)
class Dataset:
    """A labelled dataset. Models are trained only on ``train``, and compared with both splits."""

    description: DataDescription
    train: Split
    held_out: Split


class InMemorySplit(NamedTuple):
    """A split that is held in memory."""

    data: LabelledImages

    def __len__(self) -> int:
        return len(self.data.labels)

    def rows(self, ids: Tensor) -> LabelledImages:
        """Return the rows ``ids`` [rows], int64 in 0 .. len - 1, in this order."""
        return LabelledImages(self.data.images[ids], self.data.labels[ids])


def in_memory(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    held_out: Tensor | None = None,
    class_names: tuple[str, ...] = (),
) -> Dataset:
    """Return a dataset that is held in memory.

    Args:
        images: [count, *sample], float32 in [-1, 1].
        labels: [count], int64 in 0 .. num_classes - 1.
        held_out: [count] bool, the images to hold out; default: every fifth image of each class.
        class_names: by label.
    """
    split = EVERY_FIFTH if held_out is None else "the held-out images are given with the data"
    held_out = every_nth_of_each_class(labels, HELD_OUT_EVERY) if held_out is None else held_out
    train, rest = (InMemorySplit(LabelledImages(images[which], labels[which])) for which in (~held_out, held_out))
    counts = torch.bincount(train.data.labels, minlength=num_classes).double()
    content = hashlib.sha256()
    for part in (images, labels, held_out):
        content.update(part.contiguous().numpy().data)
    description = DataDescription(
        sample_shape=tuple(images.shape[1:]),
        num_classes=num_classes,
        class_frequencies=tuple((counts / counts.sum()).tolist()),
        train=len(train),
        held_out=len(rest),
        sha256=fingerprint({"content": content.hexdigest(), "sample_shape": list(images.shape[1:])}),
        class_names=class_names,
        split=split,
    )
    return Dataset(description, train, rest)


def every_nth_of_each_class(labels: Tensor, n: int) -> Tensor:
    """Return a mask [count] bool of every n-th label of each class. It is the same on every machine."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():  # type: ignore[no-untyped-call]
        chosen[torch.nonzero(labels == label)[n - 1 :: n]] = True
    return chosen


def all_rows(split: Split) -> LabelledImages:
    """Return every row of a split that fits into memory."""
    return split.rows(torch.arange(len(split)))
