"""The ledger: one record per trial of a sweep, stored in OUT/trials/NAME.json, locally or on S3.

Only the driver writes records, before a trial starts and while it runs. After a crash, the same command reads the
trials with their values, progress and reports from these records.
"""

from typing import Any, Literal

from pydantic import Field

from kac.util import files
from kac.util.errors import DistillKacError
from kac.util.options import Options
from pipeline.sweep.planned_trials import PlannedTrial


class TrialRecord(Options):
    """The state of a trial."""

    number: int
    name: str
    out: str  # folder of the model
    values: dict[str, Any]  # varied fields by dotted name; "chain": "20-4" for a student of a chain
    status: Literal["waiting", "running", "finished", "stopped", "failed"] = "waiting"
    updates: int = 0  # completed updates
    seconds: float = 0.0  # training time, summed over all starts
    metrics: dict[str, float] = Field({}, description="latest value of each metric")
    error: str = ""
    has_diverged: bool = False  # whether the model, or its predecessor in a chain, has diverged
    reports: tuple[dict[str, float], ...] = ()  # all reports, each with its "update"

    @property
    def is_open(self) -> bool:
        """Whether the trial needs more training. A rerun of the sweep retries failed trials."""
        return self.status in {"waiting", "running", "failed"}


class Ledger:
    """The records of the sweep in ``out``. Every change is written immediately."""

    def __init__(self, out: str) -> None:
        self.folder = files.join(out, "trials")
        self._records: dict[str, TrialRecord] = {}
        for name in files.list_sizes(self.folder):
            if not name.endswith(".json"):
                continue
            path = files.join(self.folder, name)
            try:
                record = TrialRecord.model_validate_json(files.read_bytes(path))
            except (ValueError, DistillKacError) as error:
                raise DistillKacError(
                    f"{path} is not a valid trial record ({error}). Delete it and run the sweep again."
                ) from None
            self._records[record.name] = record

    @property
    def records(self) -> list[TrialRecord]:
        """All records, sorted by number."""
        return sorted(self._records.values(), key=lambda record: record.number)

    def get(self, name: str) -> TrialRecord | None:
        """A trial's record, or None if the ledger has no record of the trial."""
        return self._records.get(name)

    def next_number(self) -> int:
        """The number for the next new trial."""
        return max((record.number for record in self._records.values()), default=-1) + 1

    def put(self, record: TrialRecord) -> TrialRecord:
        """Write a record."""
        files.write_bytes(files.join(self.folder, f"{record.name}.json"), record.model_dump_json(indent=1).encode())
        self._records[record.name] = record
        return record

    def add(self, trial: PlannedTrial) -> TrialRecord:
        """Return a planned trial's record. If the trial has no record, write a new one."""
        if trial.name in self._records:
            return self._records[trial.name]
        return self.put(
            TrialRecord(number=self.next_number(), name=trial.name, out=trial.spec.out, values=trial.values)
        )

    def change(self, name: str, **changes: Any) -> TrialRecord:
        """Change some fields of a record and write it."""
        return self.put(self._records[name].model_copy(update=changes))

    def report(self, name: str, report: dict[str, float], base_seconds: float = 0.0) -> TrialRecord:
        """Add a report (metrics, "update", and "seconds" since this start) to a running trial's record."""
        metrics = {key: value for key, value in report.items() if key not in {"update", "seconds"}}
        updates, record = int(report.get("update", 0)), self._records[name]
        # A trial that resumed from a checkpoint reports some updates again.
        kept = tuple(earlier for earlier in record.reports if earlier["update"] < updates)
        return self.change(
            name,
            status="running",
            updates=updates,
            seconds=round(base_seconds + report.get("seconds", 0.0), 3),
            metrics={**record.metrics, **metrics},
            reports=(*kept, {"update": float(updates), **metrics}),
        )
