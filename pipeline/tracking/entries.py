"""Log entries: plain values that wait in a file, each with the time at which it was logged.

Delivering an entry twice is harmless. MLflow stores two metrics with the same name, step, value and time as one point,
and a file with the same name as one file. All other entries set values.
"""

import json
import time
from dataclasses import dataclass, field
from typing import Any, Literal, Self

REQUEST_LIMITS = {"metrics": 1000, "params": 100, "tags": 100}
"""The most values of each kind that MLflow accepts in one request. The limit for all kinds together is 1,000."""

Kind = Literal["create", "metrics", "params", "tags", "file", "datasets", "status"]


@dataclass(frozen=True)
class Entry:
    """A change to one run."""

    run_id: str
    kind: Kind
    content: dict[str, Any]
    time: int = field(default_factory=lambda: time.time_ns() // 1_000_000)  # milliseconds, as in MLflow
    step: int = 0

    def line(self) -> str:
        """The entry as one line of JSON."""
        return json.dumps(vars(self)) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Self:
        """Parse a line.

        Raises:
            ValueError: the line is incomplete, because the process that wrote it was killed.
        """
        try:
            return cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(str(error)) from None


def split_content(kind: Literal["metrics", "params", "tags"], content: dict[str, Any]) -> list[dict[str, Any]]:
    """Split values into parts that fit into one request each."""
    items, size = list(content.items()), REQUEST_LIMITS[kind]
    return [dict(items[start : start + size]) for start in range(0, len(items), size)]


def first_batch(entries: list[Entry]) -> list[Entry]:
    """The longest prefix of ``entries`` that one request can deliver; at least one entry."""
    counts = dict.fromkeys(REQUEST_LIMITS, 0)
    for index, entry in enumerate(entries):
        if entry.kind not in REQUEST_LIMITS or entry.run_id != entries[0].run_id:
            return entries[: max(1, index)]
        counts[entry.kind] += len(entry.content)
        is_full = any(counts[kind] > limit for kind, limit in REQUEST_LIMITS.items())
        if is_full or sum(counts.values()) > REQUEST_LIMITS["metrics"]:
            return entries[: max(1, index)]
    return entries
