"""Small datasets without files, from scikit-learn or generated here.

To add one, write a function that returns a ``Dataset``, and add it to ``BundledKind``, ``BUNDLED`` and ``HELP`` below.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from kac.data.splits import Dataset, in_memory


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
    """Return eight narrow Gaussians on a circle in the plane, one class each: the mixture of arXiv 2506.20641."""
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
"""The functions that make the datasets."""

HELP = "digits: 8x8 handwritten digits; moons, gaussians: points in the plane"
