"""What is logged, as it waits in a queue or in a file: one entry of plain values, with the time at which it was logged.

Delivered twice it leaves what it leaves once: a metric of one name, step, value and time is one point for MLflow, a
file of one name one file, and the rest are values that are set.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

MOST = {"metrics": 1000, "params": 100, "tags": 100}
"""What MLflow takes in one request; 1,000 in all."""

Kind = Literal["create", "metrics", "params", "tags", "file", "datasets", "status"]


@dataclass(frozen=True)
class Entry:
    """One thing that is logged to one run."""

    run_id: str
    kind: Kind
    content: dict[str, Any]
    time: int = field(default_factory=lambda: time.time_ns() // 1_000_000)  # milliseconds, as MLflow counts
    step: int = 0

    @property
    def size(self) -> int:
        """Bytes that it takes, roughly."""
        if self.kind == "file":
            return 200 + len(self.content["data"])
        return 200 + 100 * len(self.content)

    def line(self) -> str:
        """As a line of a file."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Self:
        """The entry of a line.

        Raises:
            ValueError: a line that a process which died has left unfinished.
        """
        try:
            return cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(str(error)) from None


def split(kind: Literal["metrics", "params", "tags"], content: dict[str, Any]) -> list[dict[str, Any]]:
    """The content in parts of which MLflow takes one a request."""
    items = list(content.items())
    return [dict(items[start : start + MOST[kind]]) for start in range(0, len(items), MOST[kind])]


def first_batch(entries: list[Entry]) -> list[Entry]:
    """The entries at the beginning that one request can deliver."""
    counts = dict.fromkeys(MOST, 0)
    for place, entry in enumerate(entries):
        if entry.kind not in MOST or entry.run_id != entries[0].run_id:
            return entries[: max(1, place)]
        counts[entry.kind] += len(entry.content)
        if any(counts[kind] > most for kind, most in MOST.items()) or sum(counts.values()) > MOST["metrics"]:
            return entries[: max(1, place)]
    return entries
