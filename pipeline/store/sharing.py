"""Sharing: columns that were loaded once for all processes of a node, which read them in place.

Whoever starts the processes lends (``lent_columns``, then for example Ray's object store); each of them borrows while
it reads. A borrowed batch has the same bits as one of columns that the process has loaded itself.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from pipeline.store.columns import Columns, Selection, read_group, to_columns
from pipeline.store.layout import Shard
from pipeline.store.order import grouped
from pipeline.store.prefetch import GROUP_BYTES


@dataclass(frozen=True)
class Loan:
    """Loaded columns as arrays by the name of their field in ``Columns``: they may be in shared memory, read-only."""

    selection: Selection
    arrays: Mapping[str, Any]


_borrowed: list[Loan] = []


@contextmanager
def borrowing(loans: Sequence[Loan]) -> Iterator[None]:
    """Inside, every reader of this process takes from the loans what they have of its columns."""
    _borrowed.extend(loans)
    try:
        yield
    finally:
        _borrowed.clear()


def find(selection: Selection) -> Columns | None:
    """The selected columns from a loan; None if none has them."""
    for loan in _borrowed:
        has, wants = loan.selection, selection
        if (has.store, has.identity, has.shards) == (wants.store, wants.identity, wants.shards):
            places = [has.knots.index(name) for name in wants.knots if name in has.knots]
            if len(places) == len(wants.knots):
                return _columns(loan.arrays, torch.tensor(places))
    return None


def load(selection: Selection) -> Columns:
    """The selected columns, read from the store.

    Raises:
        StoreError: a shard is missing, damaged or of another store; the message names it.
    """
    # A few shards at a time: the tables of all of them beside the tensors would double the memory.
    groups = grouped(selection.shards, GROUP_BYTES // selection.row_bytes)
    return to_columns(selection, selection.shards, (read_group(selection, group) for group in groups))


def lent_columns(selection: Selection) -> Loan:
    """Load the selected columns to lend them; raises as ``load``."""
    columns = load(selection)
    values = {field.name: getattr(columns, field.name) for field in fields(columns)}
    return Loan(selection, {name: value.numpy() for name, value in values.items() if value is not None})


def united(selections: Sequence[Selection]) -> list[Selection]:
    """For each set of shards one selection that has the knots of all selections of these shards."""
    knots: dict[tuple[Shard, ...], set[str]] = {}
    for selection in selections:
        knots.setdefault(selection.shards, set()).update(selection.knots)
    first = {selection.shards: selection for selection in selections}
    return [Selection(one.store, one.identity, shards, tuple(sorted(knots[shards]))) for shards, one in first.items()]


def _columns(arrays: Mapping[str, Any], places: torch.Tensor) -> Columns:
    with warnings.catch_warnings():  # of tensors that must not be written to: nothing here writes to loaded columns
        warnings.filterwarnings("ignore", message=".*not writable.*")
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Columns(**{"interval": None, **tensors}).at(places)
