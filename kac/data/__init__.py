"""Datasets: images in [-1, 1] with integer labels, each with a train and a held-out split.

A new kind is one module with a function ``(root) -> Dataset``, and its line in ``KINDS``.
"""

import functools
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from kac.data.bundled import digits, moons
from kac.data.dataset import Dataset, LabelledImages, all_rows
from kac.fingerprint import unhashed
from kac.options import Kinded, OptionError

__all__ = ["DataConfig", "Dataset", "LabelledImages", "all_rows", "open_dataset"]

DataKind = Literal["digits", "moons"]

KINDS: dict[DataKind, Callable[[], Dataset]] = {"digits": digits, "moons": moons}
"""Each kind, and what opens it. These two come with scikit-learn and need no ``root``."""


class DataConfig(Kinded):
    """Which dataset."""

    kind: DataKind = Field("digits", description="digits: 8x8 handwritten digits; moons: points of the plane")
    root: str | None = unhashed(None, "where its files are: a path or s3:// URI; digits and moons have none")


@functools.lru_cache(maxsize=4)
def open_dataset(config: DataConfig) -> Dataset:
    """The dataset; opened once a process.

    Raises:
        OptionError: a root for a dataset that has none.
    """
    if config.root is not None:
        raise OptionError(f"--data.root: expected none for {config.kind}, found {config.root!r}")
    return KINDS[config.kind]()
