"""A pool of Ray actors on nodes that may come and go.

If an actor is lost, its item goes to the next free actor, and a new actor starts when a node can run it.

Ray's ``ActorPool`` with restarts (2.60) does not suffice. It sends all retries of a call to the lost actor, and uses
them up in seconds, before Ray notices that the node is gone. It also gives work to actors that no node can run yet.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MAX_LOSSES = 3
"""Limit of lost actors per item. While no item is finished, a pool of N actors may lose N times as many idle actors."""


def each_once(start: Callable[[], Any], actors: int, items: Sequence[Any]) -> Iterator[Any]:
    """Yield ``actor.make(item)`` for each item once, in the order of completion.

    Args:
        start: starts an actor.
        actors: the number of actors. An actor without work is killed, which frees its resources.

    Raises:
        RayActorError: an item, or the start of actors, failed more than ``MAX_LOSSES`` times.
        RayTaskError: ``make`` raised.
    """
    import ray

    left, losses = deque(range(len(items))), Counter[int | None]()
    running: dict[Any, tuple[Any, int | None]] = {}

    def begin(actor: Any) -> None:
        running[actor.__ray_ready__.remote()] = actor, None

    try:
        for _ in range(actors):
            begin(start())
        done = 0
        while done < len(items):
            (ended,), _ = ray.wait(list(running), num_returns=1)
            actor, number = running[ended]
            try:
                result = ray.get(ended)
            except ray.exceptions.RayActorError:
                losses[number] += 1
                if losses[number] > MAX_LOSSES * (actors if number is None else 1):
                    raise
                if number is not None:
                    left.appendleft(number)
                del running[ended]
                ray.kill(actor)
                begin(start())
                continue
            del running[ended]  # after ray.get, so that the actor of a call that raised is killed below
            if number is not None:
                done += 1
                losses[None] = 0
                yield result
            if left:
                following = left.popleft()
                running[actor.make.remote(items[following])] = actor, following
            else:
                ray.kill(actor)
    finally:
        for actor, _ in running.values():
            ray.kill(actor)
