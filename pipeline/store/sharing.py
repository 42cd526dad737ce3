"""Sharing: columns loaded once per node, which all processes of the node read from shared memory.

The parent loads the columns (``load_shared``) and puts them into shared memory, for example Ray's object store. Each
child process reads them inside ``use_shared``. Batches from shared columns are bitwise equal to batches from columns
that the process loads itself.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from pipeline.store.columns import Columns, Selection, read_group, to_columns
from pipeline.store.layout import Shard
from pipeline.store.order import group_shards
from pipeline.store.prefetch import GROUP_BYTES


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
        available = shared.selection
        if available == replace(selection, knots=available.knots):
            indices = [available.knots.index(name) for name in selection.knots if name in available.knots]
            if len(indices) == len(selection.knots):
                return _to_columns(shared.arrays, torch.tensor(indices))
    return None


def _to_columns(arrays: Mapping[str, Any], knots: torch.Tensor) -> Columns:
    with warnings.catch_warnings():  # about read-only tensors; this project never writes to loaded columns
        warnings.filterwarnings("ignore", message=".*not writable.*")
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Columns(**{"interval": None, **tensors}).select(knots)


def load(selection: Selection) -> Columns:
    """Load the selected columns from the store.

    Raises:
        StoreError: a shard is missing, damaged or from another store. The message names it.
    """
    # Read a few shards at a time: holding the tables of all shards alongside the tensors would double the memory.
    groups = group_shards(selection.shards, GROUP_BYTES // selection.row_bytes)
    return to_columns(selection, selection.shards, (read_group(selection, group) for group in groups))


def load_shared(selection: Selection) -> SharedColumns:
    """Load the selected columns for sharing. Raises the same errors as ``load``."""
    columns = load(selection)
    values = {field.name: getattr(columns, field.name) for field in fields(columns)}
    return SharedColumns(selection, {name: value.numpy() for name, value in values.items() if value is not None})


def merge_selections(selections: Sequence[Selection]) -> list[Selection]:
    """Merge selections of the same shards into one that has all their knots."""
    knots: dict[tuple[Shard, ...], set[str]] = {}
    for selection in selections:
        knots.setdefault(selection.shards, set()).update(selection.knots)
    first = {selection.shards: selection for selection in selections}
    return [Selection(one.store, one.identity, shards, tuple(sorted(knots[shards]))) for shards, one in first.items()]
