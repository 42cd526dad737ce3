"""Factories for data of kind ``outside``."""

from typing import Any

import numpy as np
import torch

from kac.data import ArrayData

COUNT = 60
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (COUNT, 1, 8, 8), dtype=np.uint8)
POINTS = (RNG.random((COUNT, 2)) * 2 - 1).astype(np.float32)
LABELS = np.arange(COUNT) % 3

GIVEN: ArrayData | None = None
"""The data that ``given`` returns."""


def images(count: int = COUNT) -> ArrayData:
    return ArrayData(IMAGES[:count], LABELS[:count])


def points() -> "ArrayData":
    return ArrayData(torch.from_numpy(POINTS).double(), torch.from_numpy(LABELS).to(torch.uint8))


def named(held_out: int) -> ArrayData:
    """The last ``held_out`` images are held out, and the classes have names."""
    train = COUNT - held_out
    return ArrayData(IMAGES[:train], LABELS[:train], IMAGES[train:], LABELS[train:], ["cat", "dog", "fish"])


def given() -> ArrayData:
    return GIVEN  # type: ignore[return-value]


def raises() -> ArrayData:
    raise RuntimeError("no\ndata today")


def not_annotated():
    raise AssertionError("never called")


def mapping() -> dict[str, Any]:
    raise AssertionError("never called")
