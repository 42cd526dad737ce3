"""The reader: every row once, in an order that (seed, epoch, rank, world size) decide, from memory or streaming."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kac import files
from pipeline import store as endpoint_store
from pipeline.store import reader
from pipeline.store.layout import Shard, StoreError
from pipeline.store.reader import Batch, IntervalBatch, Store
from pipeline.store.shards import adopt, column_array
from tests.pipeline.stores import (
    copy_store,
    flip,
    last_value,
    make_spec,
    make_store,
    make_teacher,
    run_rollout,
    shard_file,
)

ROWS, KNOTS, SCALES = 300, 4, (0.0, 1.5)
STREAM = {"memory_bytes": 1}
"""A budget that nothing fits: every shard is a window of its own."""
WINDOWS = {"memory_bytes": 2 * 65 * (2 * 4 * (KNOTS + 1) + 24)}
"""A budget that the store does not fit, but whose half holds two shards of all its knots, or four of one knot."""

Modes = pytest.mark.parametrize("mode", [{}, STREAM, WINDOWS], ids=["memory", "stream", "stream-windows"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> str:
    return make_teacher(folder / "teacher")


@pytest.fixture(scope="module")
def path(folder: Path, teacher: str) -> Path:
    """300 rows a scale: nine shards of 32 and one of 12."""
    make_store(folder / "store", teacher, trajectories=ROWS, knots=KNOTS, guidance=SCALES)
    return folder / "store"


@pytest.fixture
def store(path: Path, ray_cluster: None) -> Store:
    return endpoint_store.open(str(path))


def ids(batches: Iterable[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.sample_id]


def same(one: Batch | IntervalBatch, other: Batch | IntervalBatch) -> bool:
    pairs = zip(one, other, strict=True)
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def read_all(path: Path, guidance: float) -> dict[str, np.ndarray]:
    """All rows of a scale, straight from the files."""
    store = endpoint_store.open(str(path))
    tables = [adopt(str(path), shard, store.spec)[1] for shard in store.shards if shard.guidance == guidance]
    return {name: np.concatenate([column_array(table[name]) for table in tables]) for name in tables[0].column_names}


def test_the_memory_budget_decides_between_loading_and_streaming(store: Store) -> None:
    """As the modes of these tests want it."""
    for steps in (1, 2, KNOTS):
        assert not store.is_streamed(steps, 0.0)
        assert store.is_streamed(steps, 0.0, **STREAM)
        assert store.is_streamed(steps, 0.0, **WINDOWS)
    list(store.batches(64, 0.0, [0], **WINDOWS))
    assert not store._loaded
    list(store.batches(64, 0.0, [0]))
    assert store._loaded


@Modes
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 7])
def test_every_row_is_read_exactly_once_an_epoch_over_all_ranks(store: Store, mode, world_size, seed) -> None:
    for epoch in (0, 1):
        options = {"world_size": world_size, "seed": seed, "epoch": epoch, **mode}
        ranks = [ids(store.batches(7, 0.0, rank=rank, **options)) for rank in range(world_size)]
        assert sorted(itertools.chain(*ranks)) == list(range(ROWS))
        if seed is None and world_size == 1:
            assert ranks[0] == list(range(ROWS))


@Modes
def test_batches_hold_the_rows_of_the_files(store: Store, path: Path, mode) -> None:
    rows = read_all(path, 1.5)
    for batch in store.batches(14, 1.5, [0, 2, KNOTS], seed=3, **mode):
        of = batch.sample_id.numpy()
        assert batch.knots.dtype == torch.float32
        assert batch.knots.shape == (len(of), 3, 2)
        assert np.array_equal(batch.label.numpy(), rows["label"][of])
        for i, k in enumerate((0, 2, KNOTS)):
            assert np.array_equal(batch.knots[:, i].numpy(), rows[f"knot_{k:02d}"][of])
        assert batch.interval is None


def test_all_batches_are_full_but_the_last(store: Store) -> None:
    assert [len(batch.label) for batch in store.batches(64, 0.0, seed=1)] == [64, 64, 64, 64, 44]
    assert [len(batch.label) for batch in store.batches(64, 0.0, seed=1, rank=1, world_size=7)] == [43]


@Modes
def test_epochs_and_seeds_shuffle_differently_and_the_same_ones_alike(store: Store, mode) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return ids(store.batches(16, 0.0, [0], seed=seed, epoch=epoch, **mode))

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(*which)) for which in [(1, 0), (1, 1), (1, 2), (2, 0)]}) == 4
    assert order(1, 0) != list(range(ROWS))


@Modes
@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_resumes_where_it_stopped(store: Store, mode, world_size: int) -> None:
    options = {"seed": 5, "epoch": 2, "rank": world_size - 1, "world_size": world_size, **mode}
    whole = list(store.batches(14, 0.0, [0, 4], **options))
    for start in (*range(0, len(whole), 3), len(whole), len(whole) + 5):
        rest = list(store.batches(14, 0.0, [0, 4], start_batch=start, **options))
        assert len(rest) == max(0, len(whole) - start)
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


@Modes
@pytest.mark.parametrize("rank, world_size", [(0, 1), (0, 3), (2, 3)])
def test_interval_batches_resume_where_they_stopped_in_any_epoch(
    store: Store, mode, rank: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PIPELINE_SHARDS", 8)  # so that pipelines end, in the middle of batches too
    options = {"seed": 5, "rank": rank, "world_size": world_size, **mode}
    whole = list(itertools.islice(store.interval_batches(22, 2, 0.0, **options), 30))
    assert all(len(batch.label) == 22 for batch in whole)
    for start in (1, 4, 5, 12, 13, 20, 29):
        resumed = next(store.interval_batches(22, 2, 0.0, start_batch=start, **options))
        assert same(whole[start], resumed), f"batch {start}"


@Modes
@pytest.mark.parametrize("world_size", [1, 2])
def test_interval_batches_go_on_for_ever_and_take_each_row_once_an_epoch(store: Store, path, mode, world_size) -> None:
    rows = read_all(path, 0.0)
    id_of_noise = {noise.tobytes(): i for i, noise in enumerate(rows["knot_00"])}
    assert len(id_of_noise) == ROWS
    epochs, seen = 4, Counter()
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "seed": 2, **mode}
        count = len(ids(store.batches(100, 0.0, [0, KNOTS], **options)))
        # A batch size that divides a rank's epoch lets its batches end where the epoch does.
        batches = store.interval_batches(count // 2, 1, 0.0, **options)
        # With one macro step every interval starts at the noise, which names the sample.
        for batch in itertools.islice(batches, 2 * epochs):
            seen.update(id_of_noise[x.numpy().tobytes()] for x in batch.x_start)
    assert seen == dict.fromkeys(range(ROWS), epochs)


@Modes
def test_an_interval_starts_and_ends_at_the_knots_of_its_times(store: Store, path: Path, mode) -> None:
    rows = read_all(path, 0.0)
    found = {}
    for k in range(KNOTS + 1):
        found.update({x.tobytes(): (i, k) for i, x in enumerate(rows[f"knot_{k:02d}"])})
    assert len(found) == ROWS * (KNOTS + 1)
    steps, seen = 2, Counter()
    for batch in itertools.islice(store.interval_batches(50, steps, 0.0, seed=1, **mode), 8):
        for x_start, x_end, t_start, t_end, label in zip(*batch, strict=True):
            (i, k), (j, end) = found[x_start.numpy().tobytes()], found[x_end.numpy().tobytes()]
            assert i == j
            assert end == k + KNOTS // steps
            assert (float(t_start), float(t_end)) == (1 - k / KNOTS, 1 - end / KNOTS)
            assert int(label) == rows["label"][i]
            seen[k] += 1
    assert seen.keys() == {0, 2}


def test_intervals_are_uniform_and_independent_of_the_row(store: Store) -> None:
    draws = np.zeros((ROWS, KNOTS))
    (noise,) = store.batches(ROWS, 0.0, [0])
    ids_of = {x.numpy().tobytes(): int(i) for i, x in zip(noise.sample_id, noise.knots[:, 0], strict=True)}
    counts = np.zeros(KNOTS)
    for batch in itertools.islice(store.interval_batches(ROWS, KNOTS, 0.0, seed=11), 200):
        k = ((1 - batch.t_start) * KNOTS).round().long().numpy()
        counts += np.bincount(k, minlength=KNOTS)
        for x, interval in zip(batch.x_start, k, strict=True):
            if interval == 0:
                draws[ids_of[x.numpy().tobytes()], 0] += 1
    total = counts.sum()
    # Chi-squared with 3 degrees of freedom stays below 21.1 with probability 0.9999; the draws are fixed by the seed.
    assert ((counts - total / KNOTS) ** 2 / (total / KNOTS)).sum() < 21.1
    # Each row gets the first interval in a quarter of its 200 epochs: five standard deviations either way.
    assert np.all(np.abs(draws[:, 0] - 50) < 5 * np.sqrt(200 * 0.25 * 0.75))


def test_ranks_draw_different_intervals(store: Store) -> None:
    def times(rank: int) -> list[float]:
        return next(store.interval_batches(32, KNOTS, 0.0, rank=rank, world_size=2, seed=1)).t_start.tolist()

    assert times(0) != times(1)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("mode", [{}, STREAM], ids=["memory", "stream"])
def test_more_workers_than_there_is_to_read_are_refused_on_every_rank(
    tmp_path, teacher, ray_cluster, mode, rank
) -> None:
    """Or the one without rows would wait for ever, and the others for it."""
    make_store(tmp_path / "tiny", teacher, trajectories=4, shard_size=1 if not mode else 2)
    tiny = endpoint_store.open(str(tmp_path / "tiny"))
    assert len(next(tiny.interval_batches(4, 1, rank=min(rank, 1), world_size=2, **mode)).label) == 4
    with pytest.raises(StoreError, match="expected at least 5"):
        next(tiny.interval_batches(4, 1, rank=rank, world_size=5, **mode))


def test_a_shard_of_many_blocks_streams_like_any_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data splits what is larger than its block size; the rows and their order must not care."""
    import ray

    expected = list(store.batches(14, 0.0, seed=5, **STREAM))
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 400)
    found = list(store.batches(14, 0.0, seed=5, **STREAM))
    assert len(found) == len(expected)
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


class CountingFile:
    """A file that counts the bytes read from it."""

    def __init__(self, file, counts: Counter[str], name: str) -> None:
        self.file, self.counts, self.name = file, counts, name

    def read(self, *arguments):
        data = self.file.read(*arguments)
        self.counts[self.name] += len(data)
        return data

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()


class CountingFileSystem:
    def __init__(self, fs, counts: Counter[str]) -> None:
        self.fs, self.counts = fs, counts

    def open(self, path: str, mode: str = "rb"):
        return CountingFile(self.fs.open(path, mode), self.counts, path)

    def cat_file(self, path: str) -> bytes:
        data = self.fs.cat_file(path)
        self.counts[path] += len(data)
        return data

    def __getattr__(self, name: str):
        return getattr(self.fs, name)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes read of each file from now on."""
    counts: Counter[str] = Counter()
    locate = files.locate

    def counting(path: str) -> files.Location:
        location = locate(path)
        return files.Location(CountingFileSystem(location.fs, counts), location.path)

    monkeypatch.setattr(files, "locate", counting)
    return counts


@pytest.fixture(scope="module")
def digits(folder: Path) -> Path:
    """One full shard of 8x8 images."""
    teacher = make_teacher(folder / "digits-teacher", "digits")
    make_store(folder / "digits", teacher, trajectories=1024, knots=20, solver_steps=20, shard_size=1024)
    return folder / "digits"


@pytest.mark.parametrize("steps, share", [(1, 0.12), (4, 0.27), (20, 1.02)])
def test_only_the_knots_that_are_needed_are_read(digits: Path, counts: Counter[str], steps: int, share: float) -> None:
    """2 of 21 columns for one macro step, 5 for four; the rest of the share is the footer and the labels."""
    path = shard_file(digits, 0)
    batch = next(endpoint_store.open(str(digits)).interval_batches(64, steps))
    assert batch.x_start.shape == (64, 1, 8, 8)
    read, size = counts[str(path)], path.stat().st_size
    assert 0.8 * (steps + 1) / 21 * size < read <= share * size


def test_columns_are_loaded_once_for_all_epochs(store: Store, counts: Counter[str]) -> None:
    for epoch in range(2):
        list(store.batches(32, 0.0, [0, 4], seed=1, epoch=epoch))
        once = counts.copy()
    list(itertools.islice(store.interval_batches(32, 1, 0.0, seed=1), 20))
    assert counts == once
    assert once


def test_opening_reads_the_manifest_alone(path: Path, counts: Counter[str]) -> None:
    endpoint_store.open(str(path))
    assert counts.keys() == {str(path / "manifest.json")}


# Forward stores


@pytest.fixture(scope="module")
def forward(folder: Path, teacher: str) -> Path:
    make_store(folder / "forward", teacher, trajectories=ROWS, knots=KNOTS, source="forward")
    return folder / "forward"


@pytest.mark.parametrize("mode", [{}, STREAM], ids=["memory", "stream"])
def test_a_forward_store_gives_each_row_its_own_interval(forward: Path, ray_cluster: None, mode) -> None:
    rows, store = read_all(forward, 0.0), endpoint_store.open(str(forward))
    id_of = {x.tobytes(): i for i, x in enumerate(rows["knot_start"])}
    seen: Counter[int] = Counter()
    for batch in itertools.islice(store.interval_batches(50, KNOTS, seed=4, **mode), 12):
        for x_start, x_end, t_start, t_end, label in zip(*batch, strict=True):
            i = id_of[x_start.numpy().tobytes()]
            seen[i] += 1
            assert np.array_equal(x_end.numpy(), rows["knot_end"][i])
            k = rows["interval"][i]
            assert (float(t_start), float(t_end)) == (1 - k / KNOTS, 1 - (k + 1) / KNOTS)
            assert int(label) == rows["label"][i]
    assert seen == dict.fromkeys(range(ROWS), 2)
    assert set(rows["interval"]) == set(range(KNOTS))
    plain = list(store.batches(16, seed=1, **mode))
    assert sorted(ids(plain)) == list(range(ROWS))
    assert all(torch.equal(b.interval, torch.from_numpy(rows["interval"])[b.sample_id].long()) for b in plain)


def test_a_forward_store_has_one_step_count_and_no_knots_to_choose(forward: Path) -> None:
    store = endpoint_store.open(str(forward))
    for steps in (1, 2, 3, 8):
        with pytest.raises(
            StoreError, match=f"--steps: expected 4, the intervals of this forward store, found {steps}"
        ):
            next(store.interval_batches(4, steps))
    with pytest.raises(StoreError, match="knots: expected None for a forward store"):
        next(store.batches(4, knots=[0]))


# PyTorch


@pytest.mark.parametrize("workers", [0, 2])
@Modes
def test_a_data_loader_reads_every_row_once_an_epoch(
    path: Path, workers: int, mode: dict[str, int], ray_cluster: None
) -> None:
    dataset = endpoint_store.open(str(path)).dataset(8, guidance=1.5, knots=[0, 4], seed=3, **mode)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    first = ids(loader)
    assert sorted(first) == list(range(ROWS))
    assert ids(loader) == first
    dataset.set_epoch(1)
    second = ids(loader)
    assert sorted(second) == list(range(ROWS))
    assert second != first


def test_data_loader_workers_share_the_rows_of_their_rank(path: Path) -> None:
    store = endpoint_store.open(str(path))
    ranks = [
        ids(DataLoader(store.dataset(8, guidance=0.0, seed=3, rank=r, world_size=2), batch_size=None, num_workers=2))
        for r in range(2)
    ]
    assert sorted(ranks[0] + ranks[1]) == list(range(ROWS))
    assert abs(len(ranks[0]) - len(ranks[1])) <= 2


# Refusals


def test_an_unknown_guidance_scale_is_refused_by_name(store: Store) -> None:
    for read in (
        lambda: next(store.batches(4, 2.0)),
        lambda: next(store.interval_batches(4, 1, 2.0)),
        lambda: store.rows(2.0),
    ):
        with pytest.raises(StoreError, match=r"--guidance: expected one of the store's scales \[0.0, 1.5\], found 2.0"):
            read()
    with pytest.raises(StoreError, match=r"guidance: expected one of \[0.0, 1.5\], found None"):
        next(store.batches(4))


@pytest.mark.parametrize("steps", [0, 3, 8, -1])
def test_a_step_count_that_does_not_divide_the_knots_is_refused(store: Store, steps: int) -> None:
    with pytest.raises(StoreError, match=rf"expected a divisor of the store's 4 knots \[1, 2, 4\], found {steps}"):
        next(store.interval_batches(4, steps, 0.0))


@pytest.mark.parametrize("knots", [[5], [-1], [], [0, 9], [0, 4, 0]])
def test_knots_outside_the_store_or_named_twice_are_refused(store: Store, knots: list[int]) -> None:
    with pytest.raises(StoreError, match=r"knots: expected different indices 0 .. 4, found"):
        next(store.batches(4, 0.0, knots))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_without_rows_is_refused(store: Store, batch_size: int) -> None:
    for batches in (store.batches(batch_size, 0.0), store.interval_batches(batch_size, 2, 0.0)):
        with pytest.raises(StoreError, match=rf"batch_size: expected 1 or more, found {batch_size}"):
            next(batches)


@pytest.mark.parametrize("option", ["start_batch", "epoch", "seed"])
@pytest.mark.parametrize("value", [-1, 2**63])
@pytest.mark.parametrize("memory_bytes", [2**30, 1], ids=["memory", "stream"])
def test_a_place_outside_the_order_is_refused(store: Store, option: str, value: int, memory_bytes: int) -> None:
    with pytest.raises(StoreError, match=rf"^{option}: expected 0 .. 2\^63 - 1, found {value}$"):
        next(store.batches(4, 0.0, memory_bytes=memory_bytes, **{option: value}))


def test_the_largest_seeds_are_told_apart(store: Store) -> None:
    """They pass through numpy as whole numbers, not as float64."""
    last = [next(store.batches(20, 0.0, seed=2**63 - 1 - n)).sample_id.tolist() for n in range(2)]
    assert last[0] != last[1]


def test_an_endless_read_from_a_negative_batch_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="start_batch: expected 0"):
        next(store.interval_batches(4, 2, 0.0, start_batch=-1))


def test_a_rank_outside_the_world_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match=r"rank: expected 0 .. 1, found 2"):
        next(store.batches(4, 0.0, rank=2, world_size=2))


def test_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected an endpoint store, found none: make one with"):
        endpoint_store.open(str(tmp_path))


def test_an_unfinished_store_is_refused_unless_asked_for(tmp_path: Path, teacher: str) -> None:
    spec = make_spec(tmp_path / "begun", teacher)
    run_rollout(spec, is_sealed=False)
    shard_file(spec.store, 1).unlink()
    with pytest.raises(StoreError, match=r"expected a finished store, found 3 shards and no manifest"):
        endpoint_store.open(spec.store)
    store = endpoint_store.open(spec.store, allow_unfinished=True)
    assert ids(store.batches(10)) == [*range(32), *range(64, 100)]


def test_a_damaged_or_foreign_shard_of_an_unfinished_store_is_named(tmp_path: Path, teacher: str) -> None:
    spec = make_spec(tmp_path / "begun", teacher)
    run_rollout(spec, is_sealed=False)
    good = shard_file(spec.store, 2).read_bytes()
    make_store(tmp_path / "other", teacher, seed=9)
    for bad in (good[:200], shard_file(tmp_path / "other", 2).read_bytes()):
        shard_file(spec.store, 2).write_bytes(bad)
        with pytest.raises(StoreError, match=r"begun/data/guidance=0.0/shard-000002.parquet: expected"):
            endpoint_store.open(spec.store, allow_unfinished=True)


def test_missing_shards_are_named(path: Path, tmp_path: Path) -> None:
    bad = copy_store(path, tmp_path / "bad")
    shard_file(bad, 2, 1.5).unlink()
    with pytest.raises(
        StoreError, match=r"expected 20 shards, found 1 of them missing: data/guidance=1.5/shard-000002"
    ):
        endpoint_store.open(str(bad))


@pytest.mark.parametrize("mode", [{}, STREAM], ids=["memory", "stream"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "vanished", "short", "other scale", "other store"])
def test_a_damaged_shard_is_named_when_it_is_read(
    path: Path, tmp_path: Path, ray_cluster, teacher, mode, damage
) -> None:
    bad = copy_store(path, tmp_path / "bad")
    store, file = endpoint_store.open(str(bad)), shard_file(bad, 1, 0.0)
    if damage == "flipped":
        flip(file, last_value(file, "knot_03"))
    elif damage == "vanished":
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
    with pytest.raises(Exception, match=r"bad/data/guidance=0.0/shard-000001.parquet: expected") as refusal:
        list(store.batches(16, 0.0, **mode))
    assert isinstance(refusal.value, StoreError)
    assert len(ids(store.batches(16, 1.5, **mode))) == ROWS


def test_a_newer_store_is_refused(path: Path, tmp_path: Path) -> None:
    bad = copy_store(path, tmp_path / "bad")
    manifest = json.loads((bad / "manifest.json").read_text())
    (bad / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 2, "unheard": "of"}))
    with pytest.raises(StoreError, match=r"expected store schema version 1 or older, found 2: use a newer distillkac"):
        endpoint_store.open(str(bad))


def test_a_changed_or_broken_manifest_is_refused(path: Path, tmp_path: Path) -> None:
    bad = copy_store(path, tmp_path / "bad")
    text = (bad / "manifest.json").read_text()
    for changed, reason in [
        (text.replace('"seed": 0', '"seed": 1'), "expected fingerprint .* the manifest was changed by hand or damaged"),
        (text[: len(text) // 2], "expected the manifest of a store, found"),
        ("[]", "expected the manifest of a store, found"),
        ("", "expected the manifest of a store, found"),
    ]:
        assert changed != text
        (bad / "manifest.json").write_text(changed)
        with pytest.raises(StoreError, match=f"manifest.json: {reason}"):
            endpoint_store.open(str(bad))


def test_a_manifest_that_plans_rows_it_has_no_receipt_for_is_refused(path: Path, tmp_path: Path) -> None:
    bad = copy_store(path, tmp_path / "bad")
    manifest = json.loads((bad / "manifest.json").read_text())
    for stop, name in ((ROWS + 1, "shard-000009"), (5000, "shard-000009")):
        manifest["contents"][0]["ids"] = [[0, stop]]
        (bad / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(
            StoreError, match=f"expected a receipt for all rows of each planned shard, found none .*{name}"
        ):
            endpoint_store.open(str(bad))


def test_a_shard_that_grows_while_the_store_is_open_gives_the_rows_of_the_manifest(path, tmp_path, teacher) -> None:
    grown = copy_store(path, tmp_path / "grown")
    before = endpoint_store.open(str(grown))
    expected = list(endpoint_store.open(str(path)).batches(9, 0.0, seed=1))
    run_rollout(make_spec(grown, teacher, trajectories=310, guidance=SCALES), is_sealed=False)
    assert adopt(str(grown), Shard(0.0, 9, 288, 12), before.spec)[0].rows == 22
    assert all(same(a, b) for a, b in zip(expected, before.batches(9, 0.0, seed=1), strict=True))
    again = endpoint_store.open(str(grown))
    assert all(same(a, b) for a, b in zip(expected, again.batches(9, 0.0, seed=1), strict=True))
    assert again.rows(0.0) == ROWS
