"""Items one by one on Ray Data, with the settings that the rollout, readers ahead and the check of a store share."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ray

MAX_BLOCKS = 10_000
"""Each costs the driver 5 to 8 ms of CPU (Ray 2.60). What a dead actor leaves is done again by the block."""


def each(
    items: Sequence[int] | Sequence[str],
    work: Callable[..., Any],
    *,
    pause_seconds: float,
    blocks: int | None = None,
    **map_options: Any,
) -> "ray.data.Dataset":
    """What ``work`` makes of each item, in a lazy ``ray.data.Dataset``.

    Args:
        items: all that a call needs to know of its own part of the work. What ``work`` itself refers to is sent to
            every actor, and unpacked for every task.
        work: a function, or a class for actors; it takes one item a call, as ``batch["item"][0]``.
        pause_seconds: see ``_pause``. map_options: of ``ray.data.Dataset.map_batches``.
        blocks: into how many the items are cut; default: one an item, ``MAX_BLOCKS`` at most.
    """
    import ray

    blocks = blocks or min(len(items), MAX_BLOCKS)
    done = ray.data.from_items(list(items), override_num_blocks=blocks).map_batches(
        work, batch_size=1, batch_format="numpy", **map_options
    )
    done.context.enable_progress_bars = False
    done.context.max_errored_blocks = 0  # more would drop blocks in silence
    done.context.custom_execution_callback_classes = [_pause(pause_seconds)]
    return done


def _pause(seconds: float) -> type:
    """A rest of Ray Data's loop, in the process that consumes the rows, after each of its rounds.

    The loop waits for nothing but tasks, at most a tenth of a second. When none is running, because enough is read
    ahead, it spins, which leaves a training loop in the same process a fifth of its speed; while tasks take long, its
    ten rounds a second cost 4 % of a core (Ray 2.60).
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pause(ExecutionCallback):  # type: ignore[misc]
        """Made by Ray Data, without arguments."""

        def on_execution_step(self, executor: Any) -> None:
            """After each round."""
            time.sleep(seconds)

    return Pause
