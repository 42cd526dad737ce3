"""Datasets in memory. They come from scikit-learn, are generated in this module, or are returned by a user's function.

To add a dataset without files, write a function that returns a ``Dataset``, and add it to ``BundledKind``, ``BUNDLED``
and ``HELP`` below.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kac.data.dataset import (
    EVERY_FIFTH,
    DataDescription,
    Dataset,
    LabelledImages,
    check_labels,
    count_classes,
    every_nth_of_each_class,
)
from kac.util.errors import ArgumentError, one_line
from kac.util.fingerprint import fingerprint
from kac.util.images import from_bytes, is_image
from kac.util.imports import build

OPTION = "`data.factory`"


class InMemorySplit(NamedTuple):
    """A split of a dataset in memory."""

    data: LabelledImages

    @property
    def labels(self) -> Tensor:
        """The labels of all rows."""
        return self.data.labels

    def __len__(self) -> int:
        return len(self.data.labels)

    def rows(self, ids: Tensor) -> LabelledImages:
        """Return the rows ``ids`` [rows], int64 in 0 .. len - 1, in the order given."""
        return LabelledImages(self.data.images[ids], self.data.labels[ids])


def in_memory(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    held_out: Tensor | None = None,
    class_names: tuple[str, ...] = (),
) -> Dataset:
    """Return a dataset in memory.

    Args:
        images: [count, *sample], float32 in [-1, 1].
        labels: [count], int64 in 0 .. num_classes - 1.
        held_out: [count] bool, the images to hold out; default: every fifth image of each class.
        class_names: names of the classes, by label.
    """
    split = EVERY_FIFTH if held_out is None else "the held-out images are given with the data"
    held_out = every_nth_of_each_class(labels) if held_out is None else held_out
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


def digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 pixels with 17 grey levels."""
    from sklearn.datasets import load_digits

    source = load_digits()
    return _in_memory(source.images[:, None] / 8 - 1, source.target, num_classes=10)


def moons() -> Dataset:
    """Return two interleaving half circles in the plane: samples of shape [2]."""
    from sklearn.datasets import make_moons

    points, labels = make_moons(4096, noise=0.05, random_state=0)
    return _in_memory((points - np.array([0.5, 0.25])) / 2, labels, num_classes=2)


def gaussians() -> Dataset:
    """Return the mixture of arXiv 2506.20641: eight narrow Gaussians on a circle in the plane, one per class."""
    labels = np.arange(4096) % 8
    angle = 2 * np.pi * labels / 8
    centres = 0.75 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # RandomState gives the same stream in all versions of numpy, so the hash of the data never changes.
    points = centres + 0.05 * np.random.RandomState(0).standard_normal((4096, 2))
    return _in_memory(points, labels, num_classes=8)


def _in_memory(images: np.ndarray, labels: np.ndarray, num_classes: int) -> Dataset:
    tensor = torch.tensor(images, dtype=torch.float32).clamp(-1, 1)
    return in_memory(tensor, torch.tensor(labels, dtype=torch.int64), num_classes)


BundledKind = Literal["digits", "moons", "gaussians"]

BUNDLED: dict[str, Callable[[], Dataset]] = {"digits": digits, "moons": moons, "gaussians": gaussians}
"""The functions that create the bundled datasets."""

HELP = "digits: 8x8 handwritten digits; moons, gaussians: points in the plane"


class ArrayData(NamedTuple):
    """Labelled images or points, in arrays or tensors. A data factory is a function annotated to return ``ArrayData``.

    Model folders and worker tasks do not contain the data. They contain the data factory's import path, and workers and
    later stages call the factory again. The factory must therefore be in a module that all these processes can import,
    and must return the same values at every call.

    Example:
        >>> def make(count: int = 100) -> ArrayData:  # in mydata.py; used as --data outside --data.factory mydata:make
        ...     rng = np.random.default_rng(0)
        ...     return ArrayData(rng.integers(0, 256, (count, 1, 8, 8), np.uint8), np.arange(count) % 2)
    """

    images: np.ndarray | Tensor  # [count, 1 or 3, height, width] uint8, or points [count, d >= 2] float in [-1, 1]
    labels: np.ndarray | Tensor  # [count], integers 0 .. classes - 1
    held_out_images: np.ndarray | Tensor | None = None  # default: every fifth image of each class is held out
    held_out_labels: np.ndarray | Tensor | None = None
    class_names: Sequence[str] = ()  # by label


def open_arrays(given: str, arguments: Mapping[str, Any], flips: bool) -> Dataset:
    """Call the data factory at the import path ``given``, and return its data as a dataset.

    Raises:
        DistillKacError: the factory fails, its data are invalid, or ``flips`` is true but the data are points.
    """
    data, name = build(OPTION, given, ArrayData, arguments), f"{OPTION} {given}"
    held_out = None
    try:
        class_names = _check_names(data.class_names)
        images, labels = _check_split("", data.images, data.labels)
        if data.held_out_images is not None or data.held_out_labels is not None:
            others = _check_split("held_out_", data.held_out_images, data.held_out_labels)
            if others.images.shape[1:] != images.shape[1:]:
                shapes = f"images of shape {list(images.shape)}, but held_out_images of {list(others.images.shape)}"
                raise ValueError(f"{shapes}. Only the number of images may differ")
            held_out = torch.arange(len(labels) + len(others.labels)) >= len(labels)
            images, labels = torch.cat([images, others.images]), torch.cat([labels, others.labels])
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{name} returned {one_line(error).rstrip('.')}.") from None
    if flips and not is_image(tuple(images.shape[1:])):
        raise ArgumentError(f"`data.horizontal_flip` mirrors images, but {given} returned points. Remove this option.")
    num_classes = len(class_names) or count_classes({name: labels.numpy()})
    chosen = every_nth_of_each_class(labels) if held_out is None else held_out
    check_labels(name, labels.numpy(), num_classes, chosen.numpy())
    return in_memory(images, labels, num_classes, held_out, class_names)


def _check_split(prefix: str, images: Any, labels: Any) -> LabelledImages:
    """Return float32 images or points in [-1, 1] and int64 labels. Raises ``ValueError`` if the values are invalid."""
    images, labels = _as_tensor(f"{prefix}images", images), _as_tensor(f"{prefix}labels", labels)
    shape = list(images.shape)
    if not images.numel():
        raise ValueError(f"empty {prefix}images, of shape {shape}. Return at least one sample")
    are_images = images.dtype == torch.uint8 and images.ndim == 4 and shape[1] in (1, 3)
    are_points = images.is_floating_point() and images.ndim == 2 and shape[1] >= 2
    if not are_images and not are_points:
        raise ValueError(
            f"{prefix}images of shape {shape} and type {images.dtype}. Return uint8 images [count, channels, height, "
            "width] with 1 or 3 channels, or float points [count, d] with d >= 2"
        )
    if are_points and not bool((images.abs() <= 1).all()):  # false for NaN too
        values = f"{float(images.min()):g} to {float(images.max()):g}"
        raise ValueError(f"{prefix}images with values from {values}. Points must be in [-1, 1]")
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not is_integer or list(labels.shape) != shape[:1]:
        found = f"{prefix}labels of shape {list(labels.shape)} and type {labels.dtype} for {shape[0]:,} images"
        raise ValueError(f"{found}. Return one integer per image")
    return LabelledImages(from_bytes(images) if are_images else images.float(), labels.long())


def _as_tensor(field: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        found = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{field} as {found}. Return a numpy array of numbers or a tensor")
    return torch.tensor(np.ascontiguousarray(value))


def _check_names(class_names: Any) -> tuple[str, ...]:
    names = () if isinstance(class_names, str) or not isinstance(class_names, Sequence) else tuple(class_names)
    if len(names) != len(class_names) or not all(isinstance(one, str) for one in names) or len({*names}) < len(names):
        raise ValueError(f"class_names {one_line(class_names, 100)}. Return a list of distinct strings, one per class")
    return names
