"""A pool of actors that die: another actor computes a lost item, but an item that kills every actor ends the work."""

import os
from pathlib import Path

import pytest

from pipeline.evaluate.compute import each_once


class Mortal:
    """Dies at an item once per file ``ITEM-*`` in a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def make(self, item: int) -> tuple[int, int]:
        """The item and the id of the process."""
        for mark in self.folder.glob(f"{item}-*"):
            mark.unlink()
            os._exit(1)
        return item, os.getpid()


def test_another_actor_computes_the_item_of_a_lost_actor(tmp_path: Path, ray_cluster: None):
    import ray

    for mark in ("2-first", "2-second", "5-first"):
        (tmp_path / mark).touch()
    actor = ray.remote(Mortal).options(num_cpus=0)
    results = list(each_once(lambda: actor.remote(str(tmp_path)), 2, list(range(8))))
    assert sorted(item for item, _ in results) == list(range(8))
    assert not list(tmp_path.iterdir()), "three actors died"


def test_an_item_that_kills_every_actor_ends_the_work(tmp_path: Path, ray_cluster: None):
    import ray

    for number in range(10):
        (tmp_path / f"1-{number}").touch()
    actor = ray.remote(Mortal).options(num_cpus=0)
    with pytest.raises(ray.exceptions.RayActorError):
        list(each_once(lambda: actor.remote(str(tmp_path)), 2, [0, 1, 2]))
    assert len(list(tmp_path.iterdir())) == 6, "the item was tried four times"
