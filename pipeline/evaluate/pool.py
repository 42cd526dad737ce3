"""Numbered work on actors that come and go with their nodes.

Not Ray's own ``ActorPool`` with restarts (2.60): all retries of a call go to the actor that was lost, and are used up
in seconds, before Ray knows that its node is gone; and it gives work to actors for which no node has room. Here what a
lost actor had in hand goes to the next one that is up, and a fresh actor takes its place when there is room.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MAX_LOSSES = 3
"""So many actors one item may take with it, and so many times their number may be lost before any item is done."""


def each_once(start: Callable[[], Any], actors: int, items: Sequence[Any]) -> Iterator[Any]:
    """What ``actor.make`` makes of each item, as it is made.

    Args:
        start: starts an actor. actors: how many, as there is room for them; one with nothing left to do makes room.

    Raises:
        RayActorError: an item, or the start of actors, fails again and again.
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
                made = ray.get(ended)
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
            del running[ended]  # only now: an actor whose call raised is killed below
            if number is not None:
                done += 1
                losses[None] = 0
                yield made
            if left:
                following = left.popleft()
                running[actor.make.remote(items[following])] = actor, following
            else:
                ray.kill(actor)
    finally:
        for actor, _ in running.values():
            ray.kill(actor)
