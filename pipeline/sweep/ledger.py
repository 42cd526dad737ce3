"""The ledger: what is known of each trial of a sweep, in OUT/trials/NAME.json: local or on S3.

A trial's record is written before it starts and as it goes on, by the driver alone: whatever is killed, the same
command reads here which trials there are, with which values, how far they came and what they reported.
"""

import json
from typing import Any, Literal

from pydantic import Field

from kac.util import files
from kac.util.errors import DistillKacError
from kac.util.options import Options

TRIALS_FOLDER = "trials"

Status = Literal["waiting", "running", "finished", "stopped", "failed"]


class TrialRecord(Options):
    """A trial."""

    number: int
    name: str
    out: str  # student folder
    values: dict[str, Any]  # of the fields that vary, by their dotted names; and "chain": "20-4" of a chain's student
    status: Status = "waiting"
    updates: int = 0  # done
    seconds: float = 0.0  # of training, over all starts
    metrics: dict[str, float] = Field({}, description="as last reported")
    error: str = ""
    has_diverged: bool = False  # it, or the student that it starts from
    reports: tuple[dict[str, float], ...] = ()  # all that it has reported, each with its "update"

    @property
    def is_open(self) -> bool:
        """Whether there is something left to do: a failed trial is tried again by the next command."""
        return self.status in {"waiting", "running", "failed"}


class Ledger:
    """The records below ``out``, as they were and as they are written from here on."""

    def __init__(self, out: str) -> None:
        self.folder = files.join(out, TRIALS_FOLDER)
        self._records: dict[str, TrialRecord] = {}
        for name in files.list_sizes(self.folder):
            if name.endswith(".json") and not files.is_temporary(name.rsplit("/", 1)[-1]):
                record = self._read(files.join(self.folder, name))
                self._records[record.name] = record

    @property
    def records(self) -> list[TrialRecord]:
        """All records by number."""
        return sorted(self._records.values(), key=lambda record: record.number)

    def get(self, name: str) -> TrialRecord | None:
        """The record of a trial; None if it has none."""
        return self._records.get(name)

    def next_number(self) -> int:
        """The number of a trial that has no record yet."""
        return max((record.number for record in self._records.values()), default=-1) + 1

    def put(self, record: TrialRecord) -> TrialRecord:
        """Write a record."""
        files.write_bytes(files.join(self.folder, f"{record.name}.json"), record.model_dump_json(indent=1).encode())
        self._records[record.name] = record
        return record

    def change(self, name: str, **changes: Any) -> TrialRecord:
        """Write a record with some of its fields changed."""
        return self.put(self._records[name].model_copy(update=changes))

    def report(self, name: str, report: dict[str, float], base_seconds: float = 0.0) -> TrialRecord:
        """Write down what a running trial reports.

        Args:
            report: its metrics with "update", and "seconds" since it started. base_seconds: before that.
        """
        metrics = {key: value for key, value in report.items() if key not in {"update", "seconds"}}
        updates, record = int(report.get("update", 0)), self._records[name]
        # A trial that went on from its last checkpoint reports some updates again.
        kept = tuple(known for known in record.reports if known["update"] < updates)
        return self.change(
            name,
            status="running",
            updates=updates,
            seconds=round(base_seconds + report.get("seconds", 0.0), 3),
            metrics={**record.metrics, **metrics},
            reports=(*kept, {"update": float(updates), **metrics}),
        )

    @staticmethod
    def _read(path: str) -> TrialRecord:
        try:
            return TrialRecord(**json.loads(files.read_bytes(path)))
        except (ValueError, TypeError, DistillKacError) as error:
            raise DistillKacError(f"{path}: expected the record of a trial, found {error}: remove it") from None
