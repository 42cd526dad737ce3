"""Early stopping: ASHA (asynchronous successive halving), with the trials of the ledger."""

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from pipeline.config import SweepSpec
from pipeline.sweep.ledger import Ledger


class LedgerASHA(FIFOScheduler):  # type: ignore[misc]
    """Ray Tune's ASHA, whose rungs also count trials of earlier starts, by name.

    A trial at its last update always continues, because it has to write its student.

    Args:
        most_updates: of the longest trial; the last rung is below it.
    """

    def __init__(self, spec: SweepSpec, ledger: Ledger, most_updates: int) -> None:
        super().__init__()
        self.asha = ASHAScheduler(
            time_attr="update",
            metric=spec.asha_metric,
            mode="min",
            max_t=max(spec.grace_updates, most_updates - 1),
            grace_period=spec.grace_updates,
            reduction_factor=spec.asha_factor,
            stop_last_trials=False,
        )
        for record in ledger.records:
            trial = SimpleNamespace(trial_id=record.name)
            self.asha.on_trial_add(None, trial)
            for report in record.reports:
                self.asha.on_trial_result(None, trial, report)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial to the lowest rung."""
        self.asha.on_trial_add(tune_controller, SimpleNamespace(trial_id=trial.config["trial"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """CONTINUE or STOP."""
        if result.get("update", 0) >= trial.config["updates"]:
            return str(FIFOScheduler.CONTINUE)
        named = SimpleNamespace(trial_id=trial.config["trial"])
        return str(self.asha.on_trial_result(tune_controller, named, result))
