"""Sharing: columns loaded once per node, which all processes of the node read from shared memory.

The parent loads the columns (``lent_columns``) and puts them into shared memory, for example Ray's object store. Each
child process reads them inside ``borrowing``. Batches from shared columns are bitwise equal to batches from columns
that the process loads itself.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from pipeline.store.columns import Columns, Selection, read_group, to_columns
from pipeline.store.layout import Shard
from pipeline.store.order import group_shards
from pipeline.store.prefetch import GROUP_BYTES


@dataclass(frozen=True)
class Loan:
    """Loaded columns as arrays, by the names of the fields of ``Columns``. They may be read-only shared memory."""

    selection: Selection
    arrays: Mapping[str, Any]


_borrowed: list[Loan] = []


@contextmanager
def borrowing(loans: Sequence[Loan]) -> Iterator[None]:
    """Inside the block, every reader of this process uses the loans instead of loading their columns."""
    _borrowed.extend(loans)
    try:
        yield
    finally:
        _borrowed.clear()


def find(selection: Selection) -> Columns | None:
    """Return the selected columns from a loan, or None if no loan contains them."""
    for loan in _borrowed:
        lent = loan.selection
        if (lent.store, lent.identity, lent.shards) == (selection.store, selection.identity, selection.shards):
            indices = [lent.knots.index(name) for name in selection.knots if name in lent.knots]
            if len(indices) == len(selection.knots):
                return _to_columns(loan.arrays, torch.tensor(indices))
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
    # Read a few shards at a time: holding the tables of all shards beside the tensors would double the memory.
    groups = group_shards(selection.shards, GROUP_BYTES // selection.row_bytes)
    return to_columns(selection, selection.shards, (read_group(selection, group) for group in groups))


def lent_columns(selection: Selection) -> Loan:
    """Load the selected columns for sharing; raises as ``load``."""
    columns = load(selection)
    values = {field.name: getattr(columns, field.name) for field in fields(columns)}
    return Loan(selection, {name: value.numpy() for name, value in values.items() if value is not None})


def united(selections: Sequence[Selection]) -> list[Selection]:
    """Merge selections of the same shards into one that has all their knots."""
    knots: dict[tuple[Shard, ...], set[str]] = {}
    for selection in selections:
        knots.setdefault(selection.shards, set()).update(selection.knots)
    first = {selection.shards: selection for selection in selections}
    return [Selection(one.store, one.identity, shards, tuple(sorted(knots[shards]))) for shards, one in first.items()]
