"""Datasets by kind. A new kind is one module with a function ``(root) -> Dataset``, and its line in ``KINDS``."""

import functools
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from kac.data.bundled import digits, moons
from kac.data.splits import Dataset
from kac.fingerprint import unhashed
from kac.options import Kinded

DataKind = Literal["digits", "moons"]

KINDS: dict[DataKind, Callable[[str | None], Dataset]] = {"digits": digits, "moons": moons}
"""Each kind, and what opens it."""


class DataConfig(Kinded):
    """Which dataset."""

    kind: DataKind = Field("digits", description="digits: 8x8 handwritten digits; moons: points of the plane")
    root: str | None = unhashed(None, "where its files are: a path or s3:// URI; digits and moons have none")


@functools.lru_cache(maxsize=4)
def open_dataset(config: DataConfig) -> Dataset:
    """The dataset; opened once per process.

    Raises:
        OptionError: a root for a dataset that has none.
    """
    return KINDS[config.kind](config.root)
