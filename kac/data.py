"""Datasets: images in [-1, 1] with integer labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

DataName = Literal["digits", "moons"]


@dataclass(frozen=True)
class Dataset:
    """A labelled dataset in memory."""

    name: str
    images: Tensor  # [count, *sample], float32 in [-1, 1]
    labels: Tensor  # [count], int64 in 0 .. num_classes - 1
    num_classes: int

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.images.shape[1:])

    @property
    def class_frequencies(self) -> tuple[float, ...]:
        """The share of each class; they sum to 1."""
        counts = torch.bincount(self.labels, minlength=self.num_classes).double()
        return tuple((counts / counts.sum()).tolist())


def load_dataset(name: str) -> Dataset:
    """The named dataset.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: expected one of {sorted(DATASETS)}")
    return DATASETS[name]()


def _digits() -> Dataset:
    """The 1,797 handwritten digits, 8x8 in 17 grey levels, that ship with scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None]
    return Dataset("digits", images, torch.tensor(digits.target, dtype=torch.int64), num_classes=10)


def _moons() -> Dataset:
    """Two interleaving half circles in the plane: samples of shape [2], for quick and very large runs."""
    from sklearn.datasets import make_moons

    points, labels = make_moons(4096, noise=0.05, random_state=0)
    centred = (points - np.array([0.5, 0.25])) / 2
    images = torch.tensor(centred, dtype=torch.float32).clamp(-1, 1)
    return Dataset("moons", images, torch.tensor(labels, dtype=torch.int64), num_classes=2)


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": _digits, "moons": _moons}
