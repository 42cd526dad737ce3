"""Sharing: columns loaded once per node, which all processes of the node read from shared memory.

The parent loads the columns (``load_shared``) and puts them into shared memory, for example Ray's object store. Each
child process reads them inside ``use_shared``. Batches from shared columns are bitwise equal to batches from columns
that the process loads itself.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.store.columns import Columns, Selection, load


@dataclass(frozen=True)
class SharedColumns:
    """Loaded columns as arrays, by the names of the fields of ``Columns``. They may be read-only shared memory."""

    selection: Selection
    arrays: Mapping[str, Any]


_shared: list[SharedColumns] = []


@contextmanager
def use_shared(columns: Sequence[SharedColumns]) -> Iterator[None]:
    """Inside the block, every reader of this process uses these columns instead of loading them."""
    _shared.extend(columns)
    try:
        yield
    finally:
        _shared.clear()


def find(selection: Selection) -> Columns | None:
    """Return the selected columns if they are shared, otherwise None."""
    for shared in _shared:
        knots = shared.selection.knots
        if shared.selection == replace(selection, knots=knots) and set(selection.knots) <= set(knots):
            with warnings.catch_warnings():  # about read-only tensors; this project never writes to loaded columns
                warnings.filterwarnings("ignore", message=".*not writable.*")
                tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in shared.arrays.items()}
            selected = torch.tensor([knots.index(name) for name in selection.knots])
            return Columns(**{"interval": None, **tensors, "selected": selected})
    return None


def load_shared(selection: Selection) -> SharedColumns:
    """Load the selected columns for sharing. Raises the same errors as ``load``."""
    arrays = {name: value.numpy() for name, value in vars(load(selection)).items() if value is not None}
    return SharedColumns(selection, arrays)


def merge_selections(selections: Sequence[Selection]) -> list[Selection]:
    """Merge selections of the same shards into one that has all their knots."""
    merged: dict[Selection, set[str]] = {}
    for selection in selections:
        merged.setdefault(replace(selection, knots=()), set()).update(selection.knots)
    return [replace(selection, knots=tuple(sorted(knots))) for selection, knots in merged.items()]
