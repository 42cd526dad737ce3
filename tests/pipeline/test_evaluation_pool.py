"""If an actor of a pool dies, another actor computes its item. An item that kills every actor stops the pool."""

import os
from pathlib import Path

import pytest

from pipeline.evaluate import compute
from pipeline.evaluate.compute import each_once


class Mortal:
    """Dies at an item as many times as the folder has files ``ITEM-*``."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def make(self, item: int) -> tuple[int, int]:
        """Return the item and the id of this process."""
        for mark in self.folder.glob(f"{item}-*"):
            mark.unlink()
            os._exit(1)
        return item, os.getpid()


def test_another_actor_computes_the_item_of_a_lost_actor(tmp_path: Path, ray_cluster: None):
    import ray

    (tmp_path / "2-first").touch()
    actor = ray.remote(Mortal).options(num_cpus=0)
    results = list(each_once(lambda: actor.remote(str(tmp_path)), 2, list(range(8))))
    assert sorted(item for item, _ in results) == list(range(8))
    assert not list(tmp_path.iterdir()), "an actor died"


def test_an_item_that_kills_every_actor_ends_the_work(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    import ray

    monkeypatch.setattr(compute, "MAX_LOSSES", 1)

    for number in range(10):
        (tmp_path / f"1-{number}").touch()
    actor = ray.remote(Mortal).options(num_cpus=0)
    with pytest.raises(ray.exceptions.RayActorError):
        list(each_once(lambda: actor.remote(str(tmp_path)), 2, [0, 1, 2]))
    assert len(list(tmp_path.iterdir())) == 8, "the item was tried twice"
