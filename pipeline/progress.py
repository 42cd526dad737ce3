"""Show progress as a bar on a terminal, or as a line every ``LINE_SECONDS`` in files and job logs."""

import os
import sys
import time
from typing import Any, Self

from kac.networks.cost import duration
from kac.util.log import log, progress_log
from pipeline.cluster import ray_internals

LINE_SECONDS = 20.0
TERMINAL_VARIABLE = "DISTILLKAC_TERMINAL"
"""A job on a terminal sets this variable for the workers of its embedded Ray cluster, which write to that terminal."""


def on_terminal() -> bool:
    """Whether the output of this process appears on a terminal."""
    return sys.stderr.isatty() or os.environ.get(TERMINAL_VARIABLE) == "1"


class ProgressBar:
    """Shows the progress of some work: as a tqdm bar on a terminal (Ray's tqdm in a worker), or as lines elsewhere.

    Args:
        title: the name of the work.
        total: the amount of work, in units.
        unit: the plural name of the unit.
        done: the amount of work already done.
        is_shown: whether to show the progress. If there are several workers, only one should show it.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0, is_shown: bool = True) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._first, self._note = done, ""
        self._started = self._last_line = time.perf_counter()
        self._writes_lines = is_shown and not on_terminal()
        if done and is_shown:
            log.info(f"{title}: resuming after {done:,} of {total:,} {unit}")
        self._bar = _terminal_bar(title, total, unit, done) if is_shown and on_terminal() else None

    def update(self, count: int, note: str = "") -> None:
        """Add ``count`` finished units. The following lines end with ``note``, such as the loss."""
        self.done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(count)
        now = time.perf_counter()
        if self._writes_lines and (now - self._last_line >= LINE_SECONDS or self.done >= self.total):
            self._last_line = now
            rate = (self.done - self._first) / max(now - self._started, 1e-9)
            parts = [f"{self.title}: {self.done:,} of {self.total:,} {self.unit}", f"{rate:,.3g} per second"]
            if self.done < self.total:
                parts.append(f"about {duration((self.total - self.done) / max(rate, 1e-9))} left")
            progress_log.info(", ".join([*parts, self._note] if self._note else parts))

    def write(self, line: str) -> None:
        """Write a line above the bar."""
        if self._bar is not None and hasattr(self._bar, "write"):
            self._bar.write(line)
        else:
            log.info(line)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _terminal_bar(title: str, total: int, unit: str, done: int) -> Any:
    import ray

    if ray.is_initialized() and ray_internals.is_worker():
        from ray.experimental import tqdm_ray

        bar = tqdm_ray.tqdm(desc=title, total=total)
        bar.update(done)
        return bar
    from tqdm import tqdm

    return tqdm(desc=title, initial=done, total=total, unit=unit, mininterval=1.0)
