"""The order of rows depends only on (seed, epoch, rank, world size)."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kac.util.errors import ArgumentError
from pipeline.store.layout import Shard
from pipeline.store.manifest import plan_shards
from pipeline.store.order import Order, group_shards, rebatch, rows_of, windows


def test_a_permutation_depends_only_on_seed_epoch_and_part() -> None:
    def order(seed: int, epoch: int, part: int, rank: int = 0) -> tuple[int, ...]:
        return tuple(Order(rank, 3, seed).permutation(50, epoch, part).tolist())

    places = list(itertools.product((0, 1, 2**63 - 1), (0, 1), (0, 1, 2)))
    assert len({order(*place) for place in places}) == len(places)
    for place in places:
        assert sorted(order(*place)) == list(range(50))
        assert order(*place, rank=2) == order(*place)


def test_without_a_seed_rows_keep_the_order_of_their_ids() -> None:
    assert Order(0, 1, None).permutation(7, 3, 2).tolist() == list(range(7))


def test_the_first_permutation_of_seed_0_never_changes() -> None:
    """Otherwise a resumed training run would read different rows."""
    assert Order(0, 1, 0).permutation(10, 0).tolist() == [5, 6, 4, 8, 0, 1, 2, 9, 7, 3]


@pytest.mark.parametrize("rank, world_size", [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ArgumentError, match=f"`rank` is {rank}, but `world_size` is {world_size}"):
        Order(rank, world_size, 0)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_numpy_would_round_is_refused(seed: int) -> None:
    with pytest.raises(ArgumentError, match=f"`seed` is {seed}"):
        Order(0, 1, seed)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 400), st.integers(0, 3))
def test_windows_fit_and_contain_every_shard_once(rows: int, world: int, most: int, epoch: int) -> None:
    shards = plan_shards(0.0, range(rows), 32)
    found: list[Shard] = []
    for rank in range(world):
        own = windows(shards, Order(rank, world, 5), epoch, most)
        assert all(rows_of(window) <= most or len(window) == 1 for window in own)
        found += itertools.chain.from_iterable(own)
        # Every epoch must have the same number of rows, because resuming divides by this number.
        assert set(itertools.chain.from_iterable(own)) == set(shards[rank::world])
    assert sorted(found) == shards


@given(st.lists(st.integers(1, 40)), st.integers(0, 100))
def test_groups_are_consecutive_and_as_large_as_possible(rows: list[int], most: int) -> None:
    shards = [Shard(0.0, i, 0, count) for i, count in enumerate(rows)]
    groups = group_shards(shards, most)
    assert list(itertools.chain.from_iterable(groups)) == shards
    for group, following in itertools.pairwise(groups):
        assert rows_of(group) + following[0].rows > most


@given(st.lists(st.integers(0, 20)), st.integers(1, 15))
def test_rebatch_keeps_the_order_and_fills_all_batches_except_the_last(sizes: list[int], batch_size: int) -> None:
    pieces = [(i, torch.arange(size)) for i, size in enumerate(sizes)]
    batches = list(rebatch(pieces, batch_size))
    flat = [(i, row) for batch in batches for i, rows in batch for row in rows.tolist()]
    assert flat == [(i, row) for i, size in enumerate(sizes) for row in range(size)]
    lengths = [sum(len(rows) for _, rows in batch) for batch in batches]
    assert all(length == batch_size for length in lengths[:-1])
    assert not lengths or 0 < lengths[-1] <= batch_size
