"""Datasets by kind. A new kind is one module with a function ``(root) -> Dataset``, and its line in ``KINDS``."""

import functools
from collections.abc import Callable
from typing import Literal, Self

from pydantic import Field, model_validator

from kac.data.bundled import digits, moons
from kac.data.idx import idx
from kac.data.splits import Dataset
from kac.fingerprint import unhashed
from kac.options import Kinded

DataKind = Literal["digits", "moons", "idx"]

BUNDLED: dict[DataKind, Callable[[], Dataset]] = {"digits": digits, "moons": moons}
"""Kinds without files, and what makes each."""

KINDS: dict[DataKind, Callable[[str], Dataset]] = {"idx": idx}
"""Kinds that are read from files, and what opens each."""


class DataConfig(Kinded):
    """Which dataset."""

    kind: DataKind = Field(
        "digits",
        description="digits: 8x8 handwritten digits; moons: points of the plane; idx: the files of MNIST's family",
    )
    root: str | None = unhashed(None, "where its files are: a path or s3:// URI; digits and moons have none")

    @model_validator(mode="after")
    def _root_where_there_are_files(self) -> Self:
        if self.kind in BUNDLED and self.root is not None:
            raise ValueError(f"--root: expected none, since {self.kind} comes with scikit-learn, found {self.root!r}")
        if self.kind not in BUNDLED and self.root is None:
            raise ValueError(f"--root: expected the folder of the files of {self.kind}, found none")
        return self


@functools.lru_cache(maxsize=4)
def open_dataset(config: DataConfig) -> Dataset:
    """The dataset; opened once per process.

    Raises:
        DistillKacError: files are missing or damaged.
    """
    return BUNDLED[config.kind]() if config.root is None else KINDS[config.kind](config.root)
