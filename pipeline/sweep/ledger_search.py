"""The searcher of Ray Tune: chooses the trial that starts next, and writes reports and ends of trials to the ledger.

The ledger holds all state, so a restarted sweep resumes from it: first the unfinished trials with their values, then
new trials.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.search import Searcher

from kac.networks.cost import duration
from kac.util.log import log
from pipeline.config import SweepSpec
from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.planned_trials import PlannedTrial, plan_trial, search_name
from pipeline.sweep.proposers import PROPOSERS


class LedgerSearch(Searcher):  # type: ignore[misc]
    """Suggests the planned trials in order, then trials with values of the search algorithm.

    Args:
        planned: unfinished trials of a grid, or unfinished trials of a search that the ledger has.
        total: the number of trials of the whole sweep.
    """

    def __init__(self, spec: SweepSpec, ledger: Ledger, planned: Sequence[PlannedTrial], total: int) -> None:
        super().__init__()
        self.spec, self.ledger, self.waiting, self.total = spec, ledger, list(planned), total
        self.proposer = PROPOSERS[spec.searcher](spec, ledger) if spec.search else None
        self.running: dict[str, tuple[str, float]] = {}  # Tune's id -> name, and seconds of earlier starts
        self.started, self.ended_here = time.perf_counter(), 0

    def suggest(self, trial_id: str) -> Any:
        """The next trial; None while every remaining trial waits for another one; FINISHED at the end."""
        trial = self._next()
        if trial is None:
            return None if self.waiting else Searcher.FINISHED
        record = self.ledger.record_of(trial)
        self.ledger.put(record.model_copy(update={"status": "waiting", "error": "", "has_diverged": False}))
        self.running[trial_id] = (trial.name, record.seconds)
        return {"trial": trial.name, "updates": trial.spec.optimizer.updates, "spec": trial.spec.model_dump_json()}

    def _next(self) -> PlannedTrial | None:
        for trial in list(self.waiting):
            # Until a predecessor is retried, its record has the status of the last attempt.
            will_be_retried = any(other.name == trial.after for other in self.waiting)
            predecessor = self.ledger.get(trial.after) if trial.after and not will_be_retried else None
            if predecessor is not None and predecessor.status in {"failed", "stopped"}:
                self.waiting.remove(trial)
                self._fail(trial, predecessor)
            elif trial.after is None or (predecessor is not None and predecessor.status == "finished"):
                self.waiting.remove(trial)
                return trial
        if self.proposer is None or self.waiting or len(self.ledger.records) >= self.spec.trials:
            return None
        number = self.ledger.next_number()
        return plan_trial(self.spec, self.proposer.propose(number), search_name(number))

    def _fail(self, trial: PlannedTrial, predecessor: TrialRecord) -> None:
        """Fail a trial whose predecessor in the chain has no student."""
        error = f"its predecessor {predecessor.name} {predecessor.status}"
        changes = {"status": "failed", "error": error, "has_diverged": predecessor.has_diverged}
        self._log_ended(self.ledger.put(self.ledger.record_of(trial).model_copy(update=changes)))

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Add a report to the ledger."""
        name, base_seconds = self.running[trial_id]
        if "update" in result and not result.get("error"):
            # Only the trial's own entries; Ray Tune adds others.
            own = ("update", "seconds", *str(result.get("reported", "")).split())
            self.ledger.report(name, {key: float(result[key]) for key in own if key in result}, base_seconds)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Record the end of a trial."""
        if trial_id not in self.running:
            return
        result = result or {}
        if error or result.get("error"):
            message = str(result.get("error") or "its process died")
            changes = {"status": "failed", "error": message, "has_diverged": bool(result.get("has_diverged"))}
        else:
            self.on_trial_result(trial_id, result)
            changes = {"status": "finished" if result.get("is_done") else "stopped"}
        record = self.ledger.change(self.running.pop(trial_id)[0], **changes)
        if self.proposer is not None:
            self.proposer.observe(record)
        self._log_ended(record)

    def _log_ended(self, record: TrialRecord) -> None:
        self.ended_here += 1
        ended = sum(not other.is_open or other.status == "failed" for other in self.ledger.records)
        metric = self.spec.asha_metric if self.spec.asha_metric in record.metrics else "loss"
        parts = []
        if record.status == "stopped":
            parts.append(f"stopped early after {record.updates:,} updates")
        if metric in record.metrics:
            parts.append(f"{metric.rsplit('/', 1)[-1].replace('_', ' ')} {record.metrics[metric]:.4g}")
        parts.append(f"{record.seconds:.0f} s")
        if record.status == "failed":
            parts = [f"failed: {record.error}"]
        left = self.total - ended
        if left > 0:
            parts.append(f"about {duration((time.perf_counter() - self.started) / self.ended_here * left)} left")
        log.info(f"sweep: {ended} of {self.total} students, {record.name}: {', '.join(parts)}")

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger holds all state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger holds all state."""
