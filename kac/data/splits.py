"""What a dataset is: a description, and two splits with random access."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kac.util.fingerprint import fingerprint
from kac.util.options import Options

HELD_OUT_EVERY = 5  # of each class, where a dataset has no split of its own
EVERY_FIFTH = "every fifth image of each class is held out"


class DataDescription(Options):
    """What is known of a dataset without reading it."""

    sample_shape: tuple[int, ...]
    num_classes: int
    class_frequencies: tuple[float, ...]  # of the training images; they sum to 1
    train: int  # images
    held_out: int
    sha256: str  # of the content of both splits
    class_names: tuple[str, ...] = ()  # by number; empty: the classes have none
    split: str = ""  # which images are held out, and how that was decided
    warnings: tuple[str, ...] = ()  # what a person should know of the files


class LabelledImages(NamedTuple):
    """Some rows of a dataset."""

    images: Tensor  # [rows, *sample], float32 in [-1, 1]
    labels: Tensor  # [rows], int64 in 0 .. num_classes - 1


class Split(Protocol):
    """The images for one purpose: training, or evaluation only."""

    def __len__(self) -> int: ...

    def rows(self, ids: Tensor) -> LabelledImages:
        """The rows ``ids`` [rows], int64 in 0 .. len - 1, in the order given, on the CPU."""
        ...


@dataclass(frozen=True)
class Dataset:
    """A labelled dataset: what models learn and are compared with, and images that nothing is trained on."""

    description: DataDescription
    train: Split
    held_out: Split


class InMemorySplit(NamedTuple):
    """A split that is one tensor."""

    data: LabelledImages

    def __len__(self) -> int:
        return len(self.data.labels)

    def rows(self, ids: Tensor) -> LabelledImages:
        """The rows ``ids`` [rows], int64 in 0 .. len - 1, in the order given."""
        return LabelledImages(self.data.images[ids], self.data.labels[ids])


def in_memory(images: Tensor, labels: Tensor, num_classes: int, held_out: Tensor | None = None) -> Dataset:
    """A dataset that fits into memory.

    Args:
        images: [count, *sample], float32 in [-1, 1]. labels: [count], int64 in 0 .. num_classes - 1.
        held_out: [count] bool, the images that are held out; None: every fifth image of each class, in their order.
    """
    split = EVERY_FIFTH if held_out is None else ""
    held_out = every_nth_of_each_class(labels, HELD_OUT_EVERY) if held_out is None else held_out
    train, rest = (InMemorySplit(LabelledImages(images[which], labels[which])) for which in (~held_out, held_out))
    counts = torch.bincount(train.data.labels, minlength=num_classes).double()
    description = DataDescription(
        sample_shape=tuple(images.shape[1:]),
        num_classes=num_classes,
        class_frequencies=tuple((counts / counts.sum()).tolist()),
        train=len(train),
        held_out=len(rest),
        sha256=_content_sha256(images, labels, held_out),
        split=split,
    )
    return Dataset(description, train, rest)


def every_nth_of_each_class(labels: Tensor, n: int) -> Tensor:
    """Which of ``labels`` [count] are the n-th, 2n-th, ... of their class: [count] bool. The same on every machine."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():  # type: ignore[no-untyped-call]
        chosen[torch.nonzero(labels == label)[n - 1 :: n]] = True
    return chosen


def all_rows(split: Split) -> LabelledImages:
    """Every row of a split that fits into memory."""
    return split.rows(torch.arange(len(split)))


def _content_sha256(images: Tensor, labels: Tensor, held_out: Tensor) -> str:
    digest = hashlib.sha256()
    for part in (images, labels, held_out):
        digest.update(part.contiguous().numpy().data)
    return fingerprint({"content": digest.hexdigest(), "sample_shape": list(images.shape[1:])})
