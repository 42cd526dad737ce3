"""Which trial of a sweep starts next, how reports reach the ledger, and which trials stop early.

The ledger holds all state, so a restarted sweep resumes from it: first the unfinished trials with their values, then
new trials.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from kac.networks.cost import duration
from kac.util import files
from kac.util.log import log
from pipeline.config import SweepSpec
from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.space import Point, is_choice, sample

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

OPTUNA_FILE = "optuna.log"
CONTROL = ("update", "seconds", "is_done", "error", "has_diverged")
"""The entries of a report that are not metrics."""


class Proposer(Protocol):
    """A search algorithm: proposes the values of each trial."""

    def propose(self, number: int) -> dict[str, Any]:
        """The values of trial ``number``."""
        ...

    def observe(self, record: TrialRecord) -> None:
        """Learn from a trial that has ended."""
        ...


class RandomSearch:
    """Random search. The values of a trial depend only on the seed and the trial's number."""

    def __init__(self, space: "Mapping[str, BaseDistribution]", seed: int) -> None:
        self.space, self.seed = space, seed

    def propose(self, number: int) -> dict[str, Any]:
        """The values of trial ``number``."""
        generator = random.Random(f"{self.seed}-{number}")
        return {name: sample(distribution, generator) for name, distribution in self.space.items()}

    def observe(self, record: TrialRecord) -> None:
        """Do nothing."""


class Optuna:
    """Optuna's TPE (tree-structured Parzen estimator), with the trials of the ledger as its history.

    Each start rebuilds the study from the ledger, which is never behind the study. A local sweep also writes the study
    to OUT/optuna.log for Optuna's dashboard.
    """

    def __init__(
        self, space: "Mapping[str, BaseDistribution]", seed: int, metric: str, ledger: Ledger, out: str
    ) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.metric = space, metric
        storage = None
        if "://" not in out:
            path = files.join(out, OPTUNA_FILE)
            files.write_bytes(path, b"")
            storage = JournalStorage(JournalFileBackend(path))
        records = ledger.records
        # With the same seed, a restarted sampler would repeat its first proposals.
        sampler = optuna.samplers.TPESampler(seed=seed + len(records), constant_liar=True)
        self.search = OptunaSearch(
            dict(space), metric=metric, mode="min", sampler=sampler, storage=storage, study_name="distillkac"
        )
        self.proposed: set[str] = set()
        for record in records:
            if not record.is_open:
                self.observe(record)

    def propose(self, number: int) -> dict[str, Any]:
        """The values of trial ``number``."""
        name = f"trial-{number:04d}"
        self.proposed.add(name)
        return dict(self.search.suggest(name))

    def observe(self, record: TrialRecord) -> None:
        """Add a trial that has ended to the study. A trial that stopped early counts with its last value."""
        value = record.metrics.get(self.metric)
        has_failed = record.status == "failed" or value is None
        if record.name in self.proposed:
            result = None if has_failed else {self.metric: value}
            self.search.on_trial_complete(record.name, result, error=has_failed)
            return
        values = {name: _as_given(one, record.values.get(name)) for name, one in self.space.items()}
        if None not in values.values():
            self.search.add_evaluated_point(values, value, error=has_failed)


def _as_given(distribution: Any, value: Any) -> Any:
    """The value as the user wrote it: a record has typed values, but a choice has text. None if no choice matches."""
    if not is_choice(distribution):
        return value
    return next((choice for choice in distribution.choices if _is_same(choice, value)), None)


def _is_same(choice: Any, value: Any) -> bool:
    try:
        return float(choice) == float(value)
    except (TypeError, ValueError):
        return str(choice) == str(value)


class LedgerSearch(Searcher):  # type: ignore[misc]
    """Searcher for Ray Tune: suggests the open points in order, then the proposals of a search.

    Args:
        points: unfinished points of the grid, or unfinished recorded trials of a search.
        total: the number of trials of the whole sweep.
        make_point: makes the point of a new trial from its number and values.
    """

    def __init__(
        self,
        spec: SweepSpec,
        ledger: Ledger,
        points: Sequence[Point],
        total: int,
        proposer: Proposer | None = None,
        make_point: Callable[[int, Mapping[str, Any]], Point] | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.ledger, self.waiting, self.total = spec, ledger, list(points), total
        self.proposer, self.make_point = proposer, make_point
        self.running: dict[str, tuple[str, float]] = {}  # Tune's id -> name, and seconds of earlier starts
        self.started, self.ended_here = time.perf_counter(), 0

    def suggest(self, trial_id: str) -> Any:
        """The next trial; None while every remaining trial waits for another one; FINISHED at the end."""
        point = self._next()
        if point is None:
            return None if self.waiting else Searcher.FINISHED
        record = self.ledger.get(point.name)
        if record is None:
            record = TrialRecord(
                number=self.ledger.next_number(), name=point.name, out=point.spec.out, values=point.values
            )
        self.ledger.put(record.model_copy(update={"status": "waiting", "error": "", "has_diverged": False}))
        self.running[trial_id] = (point.name, record.seconds)
        return {"trial": point.name, "spec": point.spec.model_dump_json()}

    def _next(self) -> Point | None:
        for point in list(self.waiting):
            # Until a predecessor is retried, its record has the status of the last attempt.
            will_be_retried = any(other.name == point.after for other in self.waiting)
            predecessor = self.ledger.get(point.after) if point.after and not will_be_retried else None
            if predecessor is not None and predecessor.status in {"failed", "stopped"}:
                self.waiting.remove(point)
                self._fail(point, predecessor)
            elif point.after is None or (predecessor is not None and predecessor.status == "finished"):
                self.waiting.remove(point)
                return point
        if self.proposer is None or self.waiting or len(self.ledger.records) >= self.spec.trials:
            return None
        assert self.make_point is not None
        number = self.ledger.next_number()
        return self.make_point(number, self.proposer.propose(number))

    def _fail(self, point: Point, predecessor: TrialRecord) -> None:
        """Fail a trial whose predecessor in the chain has no student."""
        error = f"its predecessor {predecessor.name} {predecessor.status}"
        record = self.ledger.get(point.name) or TrialRecord(
            number=self.ledger.next_number(), name=point.name, out=point.spec.out, values=point.values
        )
        changes = {"status": "failed", "error": error, "has_diverged": predecessor.has_diverged}
        self._log_ended(self.ledger.put(record.model_copy(update=changes)))

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Add a report to the ledger."""
        name, base_seconds = self.running[trial_id]
        if "update" in result and not result.get("error"):
            self.ledger.report(name, _report(result), base_seconds)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Record the end of a trial."""
        if trial_id not in self.running:
            return
        name, base_seconds = self.running.pop(trial_id)
        result = result or {}
        if error or result.get("error"):
            message = str(result.get("error") or "its process died")
            has_diverged = bool(result.get("has_diverged"))
            record = self.ledger.change(name, status="failed", error=message, has_diverged=has_diverged)
        else:
            if "update" in result:
                self.ledger.report(name, _report(result), base_seconds)
            record = self.ledger.change(name, status="finished" if result.get("is_done") else "stopped")
        if self.proposer is not None:
            self.proposer.observe(record)
        self._log_ended(record)

    def _log_ended(self, record: TrialRecord) -> None:
        self.ended_here += 1
        ended = sum(not other.is_open or other.status == "failed" for other in self.ledger.records)
        metric = self.spec.asha_metric if self.spec.asha_metric in record.metrics else "loss"
        parts = []
        if metric in record.metrics:
            parts.append(f"{metric.rsplit('/', 1)[-1].replace('_', ' ')} {record.metrics[metric]:.4g}")
        parts.append(f"{record.seconds:.0f} s")
        if record.status == "stopped":
            parts.insert(0, f"stopped early after {record.updates:,} updates")
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


def _report(result: Mapping[str, Any]) -> dict[str, float]:
    """The trial's own entries of a result; Ray Tune adds others."""
    names = [name for name in str(result.get("reported", "")).split() if name in result]
    return {name: float(result[name]) for name in ("update", "seconds", *names) if name in result}


class Halving(FIFOScheduler):  # type: ignore[misc]
    """Ray Tune's ASHA, whose rungs also count trials of earlier starts, by name.

    A trial at its last update always continues, because it has to write its student.

    Args:
        updates: the trial's name -> updates of its whole training.
        most_updates: upper limit of the last rung.
    """

    def __init__(self, spec: SweepSpec, ledger: Ledger, updates: Callable[[str], int], most_updates: int) -> None:
        super().__init__()
        self.updates = updates
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
        self.asha.on_trial_add(tune_controller, _by_name(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """CONTINUE or STOP."""
        if result.get("update", 0) >= self.updates(trial.config["trial"]):
            return str(FIFOScheduler.CONTINUE)
        return str(self.asha.on_trial_result(tune_controller, _by_name(trial), result))


def _by_name(trial: Any) -> SimpleNamespace:
    return SimpleNamespace(trial_id=trial.config["trial"])


def report_to_tune(metrics: Mapping[str, float], started: float, **more: Any) -> None:
    """Report from a trial to Ray Tune; ``started``: ``time.perf_counter()`` at its start."""
    names = [name for name in metrics if name not in CONTROL]
    tune.report(
        {
            **metrics,
            "seconds": time.perf_counter() - started,
            "reported": " ".join(names),
            "is_done": False,
            "error": "",
            "has_diverged": False,
            **more,
        }
    )
