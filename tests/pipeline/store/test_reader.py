"""The reader yields every row once per epoch, in a reproducible order, from memory or by streaming."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from kac.losses import EndpointObjective
from kac.util.errors import ArgumentError
from pipeline import store as endpoint_store
from pipeline.store import columns as column_module
from pipeline.store.columns import Columns, Selection
from pipeline.store.layout import Shard, StoreError
from pipeline.store.reader import Store
from pipeline.store.shards import adopt
from tests.pipeline.store.reading import KNOTS, ROWS, SCALES, STREAM, WINDOWS, Modes, ids, read_all, same
from tests.pipeline.stores import copy_store, flip, last_value, make_spec, make_store, run_rollout, shard_file


def test_the_memory_budget_decides_between_loading_and_streaming(store: Store) -> None:
    """``Modes`` relies on this."""
    for mode in (STREAM, WINDOWS):
        assert store._select(0.0, [0]).bytes > mode["memory_bytes"]
    list(store.batches(64, 0.0, [0], **STREAM))
    assert not store._loaded
    list(store.batches(64, 0.0, [0]))
    assert store._loaded


@Modes
@pytest.mark.parametrize("world_size, seed", [(1, None), (3, None), (3, 7)])
def test_all_ranks_together_read_every_row_once_per_epoch(store: Store, mode, world_size, seed) -> None:
    options = {"world_size": world_size, "seed": seed, "epoch": 1, **mode}
    ranks = [ids(store.batches(7, 0.0, rank=rank, **options)) for rank in range(world_size)]
    assert sorted(itertools.chain(*ranks)) == list(range(ROWS))
    if world_size == 1:
        assert ranks[0] == list(range(ROWS))


@Modes
def test_batches_contain_the_rows_of_the_files(store: Store, path: Path, mode) -> None:
    rows = read_all(path, 1.5)
    for batch in store.batches(14, 1.5, [0, 2, KNOTS], seed=3, **mode):
        sample_ids = batch.sample_id.numpy()
        assert batch.knots.dtype == torch.float32
        assert batch.knots.shape == (len(sample_ids), 3, 2)
        assert np.array_equal(batch.label.numpy(), rows["label"][sample_ids])
        for i, k in enumerate((0, 2, KNOTS)):
            assert np.array_equal(batch.knots[:, i].numpy(), rows[f"knot_{k:02d}"][sample_ids])
        assert batch.interval is None


def test_all_batches_except_the_last_are_full(store: Store) -> None:
    assert [len(batch.label) for batch in store.batches(64, 0.0, seed=1)] == [64, 64, 64, 64, 44]
    assert [len(batch.label) for batch in store.batches(64, 0.0, seed=1, rank=1, world_size=7)] == [43]


@Modes
def test_the_shuffle_depends_on_epoch_and_seed(store: Store, mode) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return ids(store.batches(16, 0.0, [0], seed=seed, epoch=epoch, **mode))

    first, again, later, other = (order(*which) for which in [(1, 0), (1, 0), (1, 1), (2, 0)])
    assert first == again
    assert len({tuple(found) for found in (first, later, other, range(ROWS))}) == 4


@Modes
@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_resumes_where_it_stopped(store: Store, mode, world_size: int) -> None:
    options = {"seed": 5, "epoch": 2, "rank": world_size - 1, "world_size": world_size, **mode}
    whole = list(store.batches(14, 0.0, [0, 4], **options))
    for start in (1, len(whole) // 2, len(whole), len(whole) + 5):
        rest = list(store.batches(14, 0.0, [0, 4], start_batch=start, **options))
        assert len(rest) == max(0, len(whole) - start)
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_columns_are_loaded_once_for_every_seed_rank_and_epoch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[float, tuple[str, ...]]] = []
    read_columns = column_module.read_columns

    def counting(selection: Selection, *arguments) -> Columns:
        loaded.append((selection.shards[0].guidance, selection.knots))
        return read_columns(selection, *arguments)

    monkeypatch.setattr(column_module, "read_columns", counting)
    for seed, rank, epoch, start_batch in itertools.product((None, 1, 2), range(2), range(2), range(2)):
        list(store.batches(32, 0.0, [0, 4], seed=seed, epoch=epoch, rank=rank, world_size=2, start_batch=start_batch))
    list(store.batches(7, 0.0, [0, 4], memory_bytes=2**40))
    for seed, rank in itertools.product(range(2), range(2)):
        batches = store.interval_batches(32, EndpointObjective(1), 0.0, seed=seed, rank=rank, world_size=2)
        list(itertools.islice(batches, 20))
    assert loaded == [(0.0, ("knot_00", "knot_04"))]
    list(store.batches(32, 1.5, [0, 4]))
    list(store.batches(32, 1.5, [0, 3]))
    assert loaded[1:] == [(1.5, ("knot_00", "knot_04")), (1.5, ("knot_00", "knot_03"))]


def test_opening_reads_only_the_manifest(path: Path, counts: Counter[str]) -> None:
    endpoint_store.open(str(path))
    assert counts.keys() == {str(path / "manifest.json")}


def test_an_unknown_guidance_scale_is_refused(store: Store) -> None:
    for read in (
        lambda: next(store.batches(4, 2.0)),
        lambda: next(store.interval_batches(4, EndpointObjective(1), 2.0)),
        lambda: store.rows(2.0),
    ):
        with pytest.raises(ArgumentError, match=r"`guidance` 2 .* guidance 0, 1\.5"):
            read()
    with pytest.raises(ArgumentError, match=r"`guidance` is required.* guidance 0, 1\.5"):
        next(store.batches(4))


@pytest.mark.parametrize("knots", [[5], [-1], [], [0, 9], [0, 4, 0]])
def test_knots_outside_the_store_or_named_twice_are_refused(store: Store, knots: list[int]) -> None:
    with pytest.raises(ArgumentError, match=r"`knots` is .* from 0 to 4"):
        next(store.batches(4, 0.0, knots))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_1_is_refused(store: Store, batch_size: int) -> None:
    for batches in (store.batches(batch_size, 0.0), store.interval_batches(batch_size, EndpointObjective(2), 0.0)):
        with pytest.raises(ArgumentError, match=f"`batch_size` is {batch_size}"):
            next(batches)


@pytest.mark.parametrize("option", ["start_batch", "epoch", "seed"])
@pytest.mark.parametrize("value", [-1, 2**63])
@pytest.mark.parametrize("memory_bytes", [2**30, 1], ids=["memory", "stream"])
def test_a_position_out_of_range_is_refused(store: Store, option: str, value: int, memory_bytes: int) -> None:
    with pytest.raises(ArgumentError, match=f"^`{option}` is {value}"):
        next(store.batches(4, 0.0, memory_bytes=memory_bytes, **{option: value}))


def test_the_largest_seeds_differ(store: Store) -> None:
    """The test fails if numpy converts seeds to float64."""
    last = [next(store.batches(20, 0.0, seed=2**63 - 1 - n)).sample_id.tolist() for n in range(2)]
    assert last[0] != last[1]


def test_a_rank_outside_the_world_is_refused(store: Store) -> None:
    with pytest.raises(ArgumentError, match="`rank` is 2"):
        next(store.batches(4, 0.0, rank=2, world_size=2))


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{tmp_path} is not an endpoint store"):
        endpoint_store.open(str(tmp_path))


def test_an_unfinished_store_is_refused_unless_allowed(tmp_path: Path, teacher: str) -> None:
    spec = make_spec(tmp_path / "begun", teacher)
    run_rollout(spec, is_sealed=False)
    shard_file(spec.store, 1).unlink()
    with pytest.raises(StoreError, match="begun is unfinished: it has 3 shards"):
        endpoint_store.open(spec.store)
    store = endpoint_store.open(spec.store, allow_unfinished=True)
    assert ids(store.batches(10)) == [*range(32), *range(64, 100)]


def test_opening_an_unfinished_store_names_a_damaged_or_foreign_shard(tmp_path: Path, teacher: str) -> None:
    spec = make_spec(tmp_path / "begun", teacher)
    run_rollout(spec, is_sealed=False)
    good = shard_file(spec.store, 2).read_bytes()
    make_store(tmp_path / "other", teacher, seed=9)
    for bad in (good[:200], shard_file(tmp_path / "other", 2).read_bytes()):
        shard_file(spec.store, 2).write_bytes(bad)
        with pytest.raises(StoreError, match=r"begun/data/guidance=0.0/shard-000002.parquet "):
            endpoint_store.open(spec.store, allow_unfinished=True)


def test_missing_shards_are_named(path: Path, tmp_path: Path) -> None:
    bad = copy_store(path, tmp_path / "bad")
    shard_file(bad, 2, 1.5).unlink()
    with pytest.raises(StoreError, match=r"lacks 1 of its 20 shards, such as data/guidance=1.5/shard-000002"):
        endpoint_store.open(str(bad))


@pytest.mark.parametrize("mode", [{}, STREAM], ids=["memory", "stream"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing", "short", "other scale", "other store"])
def test_reading_names_a_damaged_shard(path: Path, tmp_path: Path, ray_cluster, teacher, mode, damage) -> None:
    bad = copy_store(path, tmp_path / "bad")
    store, file = endpoint_store.open(str(bad)), shard_file(bad, 1, 0.0)
    if damage == "flipped":
        flip(file, last_value(file, "knot_03"))
    elif damage == "missing":
        file.unlink()
    elif damage == "short":
        make_store(tmp_path / "short", teacher, trajectories=40, guidance=SCALES)
        file.write_bytes(shard_file(tmp_path / "short", 1, 0.0).read_bytes())
    elif damage == "other scale":
        file.write_bytes(shard_file(bad, 1, 1.5).read_bytes())
    elif damage == "other store":
        make_store(tmp_path / "other", teacher, guidance=SCALES, seed=9)
        file.write_bytes(shard_file(tmp_path / "other", 1, 0.0).read_bytes())
    else:
        file.write_bytes(file.read_bytes()[: 500 if damage == "truncated" else 0])
    with pytest.raises(Exception, match=r"bad/data/guidance=0.0/shard-000001.parquet ") as refusal:
        list(store.batches(16, 0.0, **mode))
    assert isinstance(refusal.value, StoreError)
    assert len(ids(store.batches(16, 1.5, **mode))) == ROWS


def test_a_shard_that_grows_while_the_store_is_open_yields_the_rows_of_the_manifest(path, tmp_path, teacher) -> None:
    grown = copy_store(path, tmp_path / "grown")
    before = endpoint_store.open(str(grown))
    expected = list(endpoint_store.open(str(path)).batches(9, 0.0, seed=1))
    run_rollout(make_spec(grown, teacher, trajectories=310, guidance=SCALES), is_sealed=False)
    assert adopt(str(grown), Shard(0.0, 9, 288, 12), before.identity)[0].rows == 22
    assert all(same(a, b) for a, b in zip(expected, before.batches(9, 0.0, seed=1), strict=True))
    again = endpoint_store.open(str(grown))
    assert all(same(a, b) for a, b in zip(expected, again.batches(9, 0.0, seed=1), strict=True))
    assert again.rows(0.0) == ROWS
