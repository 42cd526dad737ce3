"""Interval batches are endless. They contain every row once per epoch, with intervals drawn by the objective."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from kac.losses import EndpointObjective, Interval
from kac.util.errors import ArgumentError
from pipeline import store as endpoint_store
from pipeline.store.layout import StoreError
from pipeline.store.reader import Store
from tests.pipeline.store.reading import KNOTS, ROWS, STREAM, Modes, ids, read_all, same
from tests.pipeline.stores import make_store, make_teacher, shard_file


@Modes
@pytest.mark.parametrize("rank, world_size", [(0, 1), (2, 3)])
def test_interval_batches_resume_at_any_batch(store: Store, mode, rank: int, world_size: int) -> None:
    options = {"seed": 5, "rank": rank, "world_size": world_size, **mode}
    whole = list(itertools.islice(store.interval_batches(22, EndpointObjective(2), 0.0, **options), 30))
    assert all(len(batch.label) == 22 for batch in whole)
    for start in (1, 5, 13, 29):
        resumed = next(store.interval_batches(22, EndpointObjective(2), 0.0, start_batch=start, **options))
        assert same(whole[start], resumed), f"batch {start}"


@Modes
def test_interval_batches_use_each_row_once_per_epoch(store: Store, path, mode) -> None:
    rows = read_all(path, 0.0)
    id_of_noise = {noise.tobytes(): i for i, noise in enumerate(rows["knot_00"])}
    assert len(id_of_noise) == ROWS
    epochs, seen = 2, Counter()
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "seed": 2, **mode}
        count = len(ids(store.batches(100, 0.0, [0, KNOTS], **options)))
        # The batch size divides the rows of a rank, so an epoch ends at the end of a batch.
        batches = store.interval_batches(count // 2, EndpointObjective(1), 0.0, **options)
        # With one student step, every interval starts at the noise, which identifies the sample.
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
    for batch in itertools.islice(store.interval_batches(50, EndpointObjective(steps), 0.0, seed=1, **mode), 8):
        for x_start, x_end, t_start, t_end, label, w in zip(*batch, strict=True):
            (i, k), (j, end) = found[x_start.numpy().tobytes()], found[x_end.numpy().tobytes()]
            assert i == j
            assert end == k + KNOTS // steps
            assert (float(t_start), float(t_end)) == (1 - k / KNOTS, 1 - end / KNOTS)
            assert int(label) == rows["label"][i]
            assert float(w) == 0.0
            seen[k] += 1
    assert seen.keys() == {0, 2}


def test_intervals_are_uniform_and_independent_of_the_row(store: Store) -> None:
    draws = np.zeros((ROWS, KNOTS))
    (noise,) = store.batches(ROWS, 0.0, [0])
    ids_of = {x.numpy().tobytes(): int(i) for i, x in zip(noise.sample_id, noise.knots[:, 0], strict=True)}
    counts = np.zeros(KNOTS)
    for batch in itertools.islice(store.interval_batches(ROWS, EndpointObjective(KNOTS), 0.0, seed=11), 200):
        k = ((1 - batch.t_start) * KNOTS).round().long().numpy()
        counts += np.bincount(k, minlength=KNOTS)
        for x, interval in zip(batch.x_start, k, strict=True):
            if interval == 0:
                draws[ids_of[x.numpy().tobytes()], 0] += 1
    total = counts.sum()
    # Chi-squared with 3 degrees of freedom stays below 21.1 with probability 0.9999; the draws are fixed by the seed.
    assert ((counts - total / KNOTS) ** 2 / (total / KNOTS)).sum() < 21.1
    # Each row gets the first interval in a quarter of its 200 epochs, within five standard deviations.
    assert np.all(np.abs(draws[:, 0] - 50) < 5 * np.sqrt(200 * 0.25 * 0.75))


@pytest.mark.parametrize("guidance", [0.0, (0.0, 1.5)])
def test_two_ranks_read_and_draw_the_same_as_one_rank(store: Store, guidance) -> None:
    def first(batch_size: int, **options: int) -> Interval:
        batches = store.interval_batches(batch_size, EndpointObjective(KNOTS), guidance, seed=1, **options)
        return list(itertools.islice(batches, 2))[1]

    one, halves = first(64), [first(32, rank=rank, world_size=2) for rank in (0, 1)]
    for whole, *parts in zip(one, *halves, strict=True):
        assert all(torch.equal(whole[rank::2], part) for rank, part in enumerate(parts))


@pytest.mark.parametrize("mode", [{}, STREAM], ids=["memory", "stream"])
def test_rows_of_several_guidance_scales_are_mixed_and_labelled(store: Store, path: Path, ray_cluster, mode) -> None:
    scale_of = {x.tobytes(): w for w in (0.0, 1.5) for x in read_all(path, w)[f"knot_{KNOTS:02d}"]}
    batches = store.interval_batches(ROWS, EndpointObjective(1), (0.0, 1.5), seed=3, **mode)
    seen = Counter()
    for batch in itertools.islice(batches, 2):
        assert 0.3 < batch.guidance.mean() < 1.2
        for x_end, w in zip(batch.x_end, batch.guidance, strict=True):
            assert scale_of[x_end.numpy().tobytes()] == float(w)
            seen[float(w)] += 1
    assert seen == {0.0: ROWS, 1.5: ROWS}


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("mode", [{}, STREAM], ids=["memory", "stream"])
def test_too_many_workers_are_refused_on_every_rank(tmp_path, teacher, ray_cluster, mode, rank) -> None:
    """Otherwise the other ranks would wait indefinitely for a rank without rows."""
    make_store(tmp_path / "tiny", teacher, trajectories=4, shard_size=1 if not mode else 2)
    tiny = endpoint_store.open(str(tmp_path / "tiny"))
    assert len(next(tiny.interval_batches(4, EndpointObjective(1), rank=min(rank, 1), world_size=2, **mode)).label) == 4
    with pytest.raises(StoreError, match="for 5 workers"):
        next(tiny.interval_batches(4, EndpointObjective(1), rank=rank, world_size=5, **mode))


@pytest.fixture(scope="module")
def digits(folder: Path) -> Path:
    """One full shard of 8x8 images."""
    teacher = make_teacher(folder / "digits-teacher", "digits")
    make_store(folder / "digits", teacher, trajectories=1024, knots=20, solver_steps=20, shard_size=1024)
    return folder / "digits"


@pytest.mark.parametrize("steps, share", [(1, 0.12), (4, 0.27), (20, 1.02)])
def test_only_the_needed_knots_are_read(digits: Path, counts: Counter[str], steps: int, share: float) -> None:
    """One step needs 2 of 21 columns, and four steps need 5. The rest of ``share`` is the footer and the labels."""
    path = shard_file(digits, 0)
    batch = next(endpoint_store.open(str(digits)).interval_batches(64, EndpointObjective(steps)))
    assert batch.x_start.shape == (64, 1, 8, 8)
    read, size = counts[str(path)], path.stat().st_size
    assert 0.8 * (steps + 1) / 21 * size < read <= share * size


@pytest.fixture(scope="module")
def forward(folder: Path, teacher: str) -> Path:
    make_store(folder / "forward", teacher, trajectories=ROWS, knots=KNOTS, source="forward")
    return folder / "forward"


@pytest.mark.parametrize("mode", [{}, STREAM], ids=["memory", "stream"])
def test_a_forward_store_gives_each_row_its_own_interval(forward: Path, ray_cluster: None, mode) -> None:
    rows, store = read_all(forward, 0.0), endpoint_store.open(str(forward))
    id_of = {x.tobytes(): i for i, x in enumerate(rows["knot_start"])}
    seen: Counter[int] = Counter()
    for batch in itertools.islice(store.interval_batches(50, EndpointObjective(KNOTS), seed=4, **mode), 12):
        for x_start, x_end, t_start, t_end, label, w in zip(*batch, strict=True):
            i = id_of[x_start.numpy().tobytes()]
            seen[i] += 1
            assert np.array_equal(x_end.numpy(), rows["knot_end"][i])
            k = rows["interval"][i]
            assert (float(t_start), float(t_end)) == (1 - k / KNOTS, 1 - (k + 1) / KNOTS)
            assert int(label) == rows["label"][i]
            assert float(w) == 0.0
    assert seen == dict.fromkeys(range(ROWS), 2)
    assert set(rows["interval"]) == set(range(KNOTS))
    plain = list(store.batches(16, seed=1, **mode))
    assert sorted(ids(plain)) == list(range(ROWS))
    assert all(torch.equal(b.interval, torch.from_numpy(rows["interval"])[b.sample_id].long()) for b in plain)


def test_a_forward_store_allows_one_step_count_and_no_choice_of_knots(forward: Path) -> None:
    store = endpoint_store.open(str(forward))
    for steps in (1, 2, 3, 8):
        with pytest.raises(ArgumentError, match=str(steps)) as refusal:
            next(store.interval_batches(4, EndpointObjective(steps)))
        assert refusal.value.name == "steps"
    with pytest.raises(ArgumentError, match="forward store") as refusal:
        next(store.batches(4, knots=[0]))
    assert refusal.value.name == "knots"


@pytest.mark.parametrize("steps", [0, 3, 8, -1])
def test_a_step_count_that_does_not_divide_the_knots_is_refused(store: Store, steps: int) -> None:
    with pytest.raises(ArgumentError, match=str(steps)) as refusal:
        next(store.interval_batches(4, EndpointObjective(steps), 0.0))
    assert refusal.value.name == "steps"


def test_a_negative_start_of_interval_batches_is_refused(store: Store) -> None:
    with pytest.raises(ArgumentError, match="`start_batch` is -1"):
        next(store.interval_batches(4, EndpointObjective(2), 0.0, start_batch=-1))
