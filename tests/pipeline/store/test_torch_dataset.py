"""A PyTorch DataLoader reads every row of a store once, with any number of workers."""

from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from pipeline import store as endpoint_store
from tests.pipeline.store.reading import ROWS, Modes, ids


@pytest.mark.parametrize("workers", [0, 2])
@Modes
def test_a_data_loader_reads_every_row_once_per_epoch(
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


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_a_data_loader_continues_at_any_batch(path: Path, workers: int) -> None:
    store = endpoint_store.open(str(path))

    def batches(start: int) -> list[list[int]]:
        dataset = store.dataset(8, guidance=0.0, seed=3, start_batch=start)
        return [batch.sample_id.tolist() for batch in DataLoader(dataset, batch_size=None, num_workers=workers)]

    whole = batches(0)
    for start in (1, 2, 3):
        assert batches(start) == whole[start:]


def test_persistent_workers_follow_the_epoch(path: Path) -> None:
    dataset = endpoint_store.open(str(path)).dataset(8, guidance=0.0, seed=3)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    first = ids(loader)
    dataset.set_epoch(1)
    assert ids(loader) != first


def test_data_loader_workers_split_the_rows_of_their_rank(path: Path) -> None:
    store = endpoint_store.open(str(path))
    ranks = [
        ids(DataLoader(store.dataset(8, guidance=0.0, seed=3, rank=r, world_size=2), batch_size=None, num_workers=2))
        for r in range(2)
    ]
    assert sorted(ranks[0] + ranks[1]) == list(range(ROWS))
    assert abs(len(ranks[0]) - len(ranks[1])) <= 2
