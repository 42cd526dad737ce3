"""Threads for work that mostly waits for a disk or the network."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(work: Callable[[Item], Result], items: Iterable[Item], title: str = "") -> list[Result]:
    """Return ``work`` of each item, in order. The first error cancels the remaining items.

    Args:
        title: title of a progress bar that counts shards; empty for no progress bar.
    """
    from tqdm import tqdm

    pending = list(items)
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            results = pool.map(work, pending)
            # disable=None shows the bar only on a terminal.
            return list(tqdm(results, title, len(pending), unit="shard", disable=None if title else True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
