"""Small datasets without files: of scikit-learn, or drawn here."""

import numpy as np
import torch

from kac.data.splits import Dataset, in_memory


def digits() -> Dataset:
    """1,797 handwritten digits, 8x8 in 17 grey levels."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.tensor(source.images / 8 - 1, dtype=torch.float32)[:, None]
    return in_memory(images, torch.tensor(source.target, dtype=torch.int64), num_classes=10)


def moons() -> Dataset:
    """Two interleaving half circles in the plane: samples of shape [2], for quick and very large runs."""
    from sklearn.datasets import make_moons

    points, labels = make_moons(4096, noise=0.05, random_state=0)
    centred = (points - np.array([0.5, 0.25])) / 2
    images = torch.tensor(centred, dtype=torch.float32).clamp(-1, 1)
    return in_memory(images, torch.tensor(labels, dtype=torch.int64), num_classes=2)


def gaussians() -> Dataset:
    """Eight narrow Gaussians on a circle of the plane, a class each: the mixture on which arXiv 2506.20641 compares."""
    labels = np.arange(4096) % 8
    angle = 2 * np.pi * labels / 8
    centres = 0.75 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # The stream of RandomState is fixed for all versions of numpy: the hash of the data stays.
    points = centres + 0.05 * np.random.RandomState(0).standard_normal((4096, 2))
    images = torch.tensor(points, dtype=torch.float32).clamp(-1, 1)
    return in_memory(images, torch.tensor(labels, dtype=torch.int64), num_classes=8)
