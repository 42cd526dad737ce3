"""A few threads for what mostly waits for a disk or the network."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], title: str = "") -> list[Result]:
    """``work`` of each item, in order; the first error ends it all. With a title it shows its progress in shards."""
    from tqdm import tqdm

    pending = list(items)
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            done = pool.map(work, pending)
            # disable=None: on a terminal alone
            return list(tqdm(done, title, len(pending), unit="shard", disable=None if title else True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
