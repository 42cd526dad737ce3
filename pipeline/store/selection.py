"""Selection: what is read of a store. Whose turn it is and in which order is no part of it: see ``order``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.store.layout import INTERVAL, LABEL, Shard, StoreError, StoreIdentity, knot_column


@dataclass(frozen=True)
class Selection:
    """Some knots of some shards; once loaded, they serve every equal selection."""

    store: str
    identity: StoreIdentity
    shards: tuple[Shard, ...]
    knots: tuple[str, ...]  # columns

    @property
    def scalars(self) -> list[str]:
        """The other columns that are read."""
        return [name for name in self.identity.scalar_columns if name in (LABEL, INTERVAL)]

    @property
    def row_bytes(self) -> int:
        """What a row takes as tensors."""
        return math.prod(self.identity.sample_shape) * 4 * len(self.knots) + 24


def columns_of_knots(identity: StoreIdentity, knots: Sequence[int] | None) -> tuple[str, ...]:
    """The columns of the knots of these indices; None: of all.

    Raises:
        StoreError: no knots, the same one twice, one that is not stored, or a choice of a forward store's.
    """
    if knots is None:
        return tuple(identity.knot_columns)
    if identity.source == "forward":
        raise StoreError("knots: expected None for a forward store: its rows have one interval each")
    outside = [k for k in knots if not 0 <= k <= identity.knots]
    if outside or not knots or len(set(knots)) < len(knots):
        raise StoreError(f"knots: expected different indices 0 .. {identity.knots}, found {list(knots)}")
    return tuple(knot_column(k, identity.knots) for k in knots)
