"""Process items with Ray Data, with settings for decoding, rollouts and store verification."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.cluster import ray_internals

if TYPE_CHECKING:
    import ray

MAX_BLOCKS = 10_000
"""Each block costs the driver 5 to 8 ms of CPU (Ray 2.60). If an actor dies, its whole block is processed again."""


def each(
    items: Sequence[int] | Sequence[str],
    work: Callable[..., Any],
    *,
    pause_seconds: float,
    blocks: int | None = None,
    **map_options: Any,
) -> "ray.data.Dataset":
    """Apply ``work`` to each item. Return the results as a lazy ``ray.data.Dataset``.

    Args:
        items: the items. They should contain everything that differs between calls, because data that ``work`` refers
            to is sent to every actor, and unpickled for every task.
        work: a function, or a class for actors. Each call gets one item, as ``batch["item"][0]``.
        pause_seconds: pause after each round of Ray Data's scheduling loop, in the process that consumes the rows. The
            loop waits only for running tasks, for at most 0.1 s. When enough rows are prefetched and no task is
            running, it spins, and slows a training loop in the same process to a fifth of its speed. During long
            tasks, its ten rounds per second cost 4 % of a core (Ray 2.60).
        blocks: number of blocks of items; default: one per item, at most ``MAX_BLOCKS``.
        map_options: options of ``ray.data.Dataset.map_batches``.
    """
    import ray

    blocks = blocks or min(len(items), MAX_BLOCKS)
    results = ray.data.from_items(list(items), override_num_blocks=blocks).map_batches(
        work, batch_size=1, batch_format="numpy", **map_options
    )
    results.context.enable_progress_bars = False
    results.context.max_errored_blocks = 0  # a larger value would silently drop blocks

    class Pause(ray_internals.execution_callback()):  # type: ignore[misc]
        """Pauses the scheduling loop. Ray Data creates a callback without arguments."""

        def on_execution_step(self, executor: Any) -> None:
            """Pause after each round."""
            time.sleep(pause_seconds)

    results.context.custom_execution_callback_classes = [Pause]
    return results
