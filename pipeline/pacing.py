"""How often Ray Data's loop goes round in the process that consumes its rows.

The loop waits for tasks alone, at most a tenth of a second. With none at work, as when enough is read ahead, it goes
round as fast as it can, and a training loop in the same process is left with a fifth of its speed; and while tasks take
long, ten rounds a second cost 4 % of a core (Ray 2.60).
"""

import time
from typing import Any


def pause_between_rounds(dataset: Any, seconds: float) -> None:
    """Let the pipeline of a ``ray.data.Dataset`` rest after each round of its loop."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pause(ExecutionCallback):  # type: ignore[misc]
        """Made by Ray Data, without arguments."""

        def on_execution_step(self, executor: Any) -> None:
            """After each round."""
            time.sleep(seconds)

    dataset.context.custom_execution_callback_classes = [Pause]
