"""Batches: rows gathered from loaded columns."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from kac.losses import Interval
from pipeline.store.columns import Columns

Piece = tuple[Columns, Tensor]
"""Loaded columns, and the indices of the rows to use, in order."""


class Batch(NamedTuple):
    """Rows of a store."""

    sample_id: Tensor  # [batch], int64
    label: Tensor  # [batch], int64
    knots: Tensor  # [batch, len(knots), *sample], float32
    interval: Tensor | None  # [batch], int64: the interval of each row; only in forward stores


AnyBatch = TypeVar("AnyBatch", Batch, Interval)


def gather_rows(pieces: Sequence[Piece]) -> Batch:
    """Gather all loaded columns of the rows."""
    return _concatenate(
        [
            Batch(
                columns.sample_id[rows],
                columns.label[rows],
                columns.knots_of(rows),
                None if columns.interval is None else columns.interval[rows],
            )
            for columns, rows in pieces
        ]
    )


def gather_intervals(pieces: Sequence[Piece], times: Tensor, start: Tensor, end: Tensor) -> Interval:
    """Gather one interval per row, between two of its loaded knots.

    Args:
        times: [knots], the times of the loaded knots.
        start, end: [batch], indices of loaded knots.
    """
    sizes = [len(rows) for _, rows in pieces]
    return _concatenate(
        [
            Interval(
                columns.knot_of(rows, i),
                columns.knot_of(rows, j),
                times[i],
                times[j],
                columns.label[rows],
                columns.guidance[rows],
            )
            for (columns, rows), i, j in zip(pieces, torch.split(start, sizes), torch.split(end, sizes), strict=True)
        ]
    )


def gather_stored_intervals(pieces: Sequence[Piece], times: Tensor) -> Interval:
    """Gather the interval that each row of a forward store spans.

    Args:
        times: [knots], the times of all knots of the store.
    """
    intervals = []
    for columns, rows in pieces:
        assert columns.interval is not None
        k = columns.interval[rows]
        knots, w = columns.knots_of(rows), columns.guidance[rows]
        intervals.append(Interval(knots[:, 0], knots[:, 1], times[k], times[k + 1], columns.label[rows], w))
    return _concatenate(intervals)


def _concatenate(parts: Sequence[AnyBatch]) -> AnyBatch:
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return type(parts[0])(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]
