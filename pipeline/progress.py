"""Progress for people: a bar on a terminal; elsewhere, in a file or a job's log, a line every so many seconds."""

import os
import sys
import time
from typing import Any, Self

from kac.networks.cost import duration
from kac.util.log import log, progress_log

LINE_SECONDS = 20.0
TERMINAL_VARIABLE = "DISTILLKAC_TERMINAL"
"""Set by a job on a terminal for the workers of the Ray that it starts: what they write ends up there."""


def on_terminal() -> bool:
    """Whether what is written here is seen on a terminal."""
    return sys.stderr.isatty() or os.environ.get(TERMINAL_VARIABLE) == "1"


class ProgressBar:
    """How far some work is. On a terminal it is tqdm's bar, or Ray's for a worker; elsewhere it is lines.

    Args:
        unit: what is counted, in the plural.
        done: what was done before.
        is_shown: False for all but one of several workers.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0, is_shown: bool = True) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._first, self._started = done, time.perf_counter()
        self._last_line, self._note = self._started, ""
        self._says_lines = is_shown and not on_terminal()
        self._bar = _terminal_bar(title, total, unit, done) if is_shown and on_terminal() else None

    def update(self, count: int, note: str = "") -> None:
        """So much more is done.

        Args:
            note: what else there is to say, such as the loss.
        """
        self.done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(count)
        now = time.perf_counter()
        if self._says_lines and (now - self._last_line >= LINE_SECONDS or self.done >= self.total):
            self._last_line = now
            progress_log.info(self._line(now - self._started))

    def say(self, line: str) -> None:
        """A line for itself, above the bar."""
        if self._bar is not None and hasattr(self._bar, "write"):
            self._bar.write(line)
        else:
            log.info(line)

    def close(self) -> None:
        """The work is over."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _line(self, seconds: float) -> str:
        rate = (self.done - self._first) / max(seconds, 1e-9)
        told = f"{self.title}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.3g} a second"
        if self.done < self.total:
            told += f", about {duration((self.total - self.done) / max(rate, 1e-9))} left"
        return told + (f", {self._note}" if self._note else "")


def _terminal_bar(title: str, total: int, unit: str, done: int) -> Any:
    import ray

    if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        from ray.experimental import tqdm_ray

        bar = tqdm_ray.tqdm(desc=title, total=total)
        bar.update(done)
        return bar
    from tqdm import tqdm

    return tqdm(desc=title, initial=done, total=total, unit=unit, mininterval=1.0)
