"""Data of kind ``outside``: arrays in memory, from a function that is given by its import path."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kac.data.source import check_labels, count_classes
from kac.data.splits import HELD_OUT_EVERY, Dataset, LabelledImages, every_nth_of_each_class, in_memory
from kac.util.errors import ArgumentError, one_line
from kac.util.images import from_bytes, is_image
from kac.util.imports import build

OPTION = "`data.factory`"


class ArrayData(NamedTuple):
    """Labelled images or points, as numpy arrays or tensors. A data factory is a function annotated to return them.

    The options of a data set name the function, not the data, because an object of one process can neither be sent to
    workers on other machines nor be stored in a model folder. Workers and later stages import the function and call it
    again. It must therefore be in a module that all of them can import, and return the same values at every call.

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

    Args:
        flips: whether the training images will be mirrored.

    Raises:
        DistillKacError: the factory fails, or its data are not valid.
    """
    data, name = build(OPTION, given, ArrayData, arguments), f"{OPTION} {given}"
    held_out = None
    try:
        class_names = _check_names(data.class_names)
        images, labels = _check_split("", data.images, data.labels)
        if data.held_out_images is not None or data.held_out_labels is not None:
            others = _check_split("held_out_", data.held_out_images, data.held_out_labels)
            if others.images.shape[1:] != images.shape[1:]:
                raise ValueError(
                    f"images of shape {list(images.shape)}, but held_out_images of shape {list(others.images.shape)}. "
                    "Only their number may differ"
                )
            held_out = torch.arange(len(labels) + len(others.labels)) >= len(labels)
            images, labels = torch.cat([images, others.images]), torch.cat([labels, others.labels])
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{name} returned {one_line(error).rstrip('.')}.") from None
    if flips and not is_image(tuple(images.shape[1:])):
        raise ArgumentError(f"`data.horizontal_flip` mirrors images, but {given} returned points. Remove it.")
    num_classes = len(class_names) or count_classes({name: labels.numpy()})
    chosen = every_nth_of_each_class(labels, HELD_OUT_EVERY) if held_out is None else held_out
    check_labels(name, labels.numpy(), num_classes, chosen.numpy())
    return in_memory(images, labels, num_classes, held_out, class_names)


def _check_split(prefix: str, images: Any, labels: Any) -> LabelledImages:
    """Return one split as float32 images or points in [-1, 1] and int64 labels; raise ``ValueError`` if not valid."""
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
        raise ValueError(f"{prefix}images from {values}. Points should be in [-1, 1]")
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not is_integer or list(labels.shape) != shape[:1]:
        raise ValueError(
            f"{prefix}labels of shape {list(labels.shape)} and type {labels.dtype} for {shape[0]:,} {prefix}images. "
            "Return one integer per image"
        )
    return LabelledImages(from_bytes(images) if are_images else images.float(), labels.long())


def _as_tensor(field: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{field} as {type(value).__name__}. Return a numpy array or a tensor")
    try:
        return torch.tensor(np.ascontiguousarray(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field} that cannot be converted to a tensor ({one_line(error).rstrip('.')})") from None


def _check_names(class_names: Any) -> tuple[str, ...]:
    names = () if isinstance(class_names, str) or not isinstance(class_names, Sequence) else tuple(class_names)
    if len(names) != len(class_names) or not all(isinstance(one, str) for one in names) or len({*names}) < len(names):
        raise ValueError(f"class_names {one_line(class_names, 100)}. Return a list of distinct texts, one per class")
    return names
