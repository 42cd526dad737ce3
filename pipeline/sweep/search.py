"""Which trial of a sweep is next, what its reports lead to, and which trials are stopped early.

Tune asks and tells; what is known lies in the ledger. So a restarted sweep begins where the ledger ends: first the
trials that it has not finished, with the values that they had, then new ones.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from kac.networks.cost import duration
from kac.util import files
from kac.util.log import log
from pipeline.config.specs import SweepSpec
from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.space import Choice, Draw, Integers, Point, Uniform

OPTUNA_FILE = "optuna.log"
CONTROL = ("update", "seconds", "is_done", "error", "has_diverged")
"""What a report says beside metrics."""


class Proposer(Protocol):
    """Where a search has its values from."""

    def propose(self, number: int) -> dict[str, Any]:
        """The values of the trial of this number."""
        ...

    def tell(self, record: TrialRecord) -> None:
        """How a trial ended."""
        ...


class RandomDraws:
    """Values at random: a trial's depend on the seed and its number alone."""

    def __init__(self, draws: Mapping[str, Draw], seed: int) -> None:
        self.draws, self.seed = draws, seed

    def propose(self, number: int) -> dict[str, Any]:
        """The values of the trial of this number."""
        generator = random.Random(f"{self.seed}-{number}")
        return {name: draw.sample(generator) for name, draw in self.draws.items()}

    def tell(self, record: TrialRecord) -> None:
        """Nothing is learned."""


class Optuna:
    """Values that Optuna proposes (its tree of Parzen estimators), from all that the ledger knows.

    The study is made anew from the ledger at each start: of the two the ledger cannot be the one that is behind. For a
    local sweep it is kept in OUT/optuna.log, where Optuna's dashboard finds it.
    """

    def __init__(self, draws: Mapping[str, Draw], seed: int, metric: str, ledger: Ledger, out: str) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.draws, self.metric = draws, metric
        storage = None
        if "://" not in out:
            path = files.join(out, OPTUNA_FILE)
            files.write_bytes(path, b"")
            storage = JournalStorage(JournalFileBackend(path))
        records = ledger.records
        # A sampler that starts again from the same seed would propose again what it proposed first.
        sampler = optuna.samplers.TPESampler(seed=seed + len(records), constant_liar=True)
        space = {name: _distribution(draw) for name, draw in draws.items()}
        self.search = OptunaSearch(
            space, metric=metric, mode="min", sampler=sampler, storage=storage, study_name="distillkac"
        )
        self.asked: set[str] = set()
        self.values: dict[str, dict[str, Any]] = {}
        for record in records:
            if not record.is_open:
                self.tell(record)

    def propose(self, number: int) -> dict[str, Any]:
        """The values of the trial of this number."""
        name = f"trial-{number:04d}"
        self.asked.add(name)
        return dict(self.search.suggest(name))

    def tell(self, record: TrialRecord) -> None:
        """How a trial ended: one that was stopped early counts with what it had reached."""
        value = record.metrics.get(self.metric)
        has_failed = record.status == "failed" or value is None
        if record.name in self.asked:
            result = None if has_failed else {self.metric: value}
            self.search.on_trial_complete(record.name, result, error=has_failed)
            return
        values = {
            # The record has typed values, a choice the words that they were given in.
            name: _chosen(draw, record.values.get(name))
            for name, draw in self.draws.items()
        }
        if None not in values.values():
            self.search.add_evaluated_point(values, value, error=has_failed)


def _distribution(draw: Draw) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(draw, Uniform):
        return FloatDistribution(draw.low, draw.high, log=draw.is_log)
    if isinstance(draw, Integers):
        return IntDistribution(draw.low, draw.high)
    assert isinstance(draw, Choice)
    return CategoricalDistribution(draw.values)


def _chosen(draw: Draw, value: Any) -> Any:
    if not isinstance(draw, Choice):
        return value
    return next((choice for choice in draw.values if _same(choice, value)), None)


def _same(choice: Any, value: Any) -> bool:
    try:
        return float(choice) == float(value)
    except (TypeError, ValueError):
        return str(choice) == str(value)


class LedgerSearch(Searcher):  # type: ignore[misc]
    """Tune's searcher over the ledger: hands out the open points in order, then what is proposed.

    Args:
        points: those of the grid, or of a search's recorded trials, that are not done.
        make_point: makes the point of a search's new trial from its number and values.
        total: trials of the whole sweep.
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
        self.running: dict[str, tuple[str, float]] = {}  # name, and seconds of earlier starts, by Tune's id
        self.started, self.ended_here = time.perf_counter(), 0

    def suggest(self, trial_id: str) -> Any:
        """The next trial; None while all that are left wait for others; FINISHED if there are none."""
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
            # Of one that is to be tried again, the ledger still knows how it ended last time.
            is_before_it = any(other.name == point.after for other in self.waiting)
            before = self.ledger.get(point.after) if point.after and not is_before_it else None
            if before is not None and before.status in {"failed", "stopped"}:
                self.waiting.remove(point)
                self._fail(point, before)
            elif point.after is None or (before is not None and before.status == "finished"):
                self.waiting.remove(point)
                return point
        if self.proposer is None or self.waiting or len(self.ledger.records) >= self.spec.trials:
            return None
        assert self.make_point is not None
        number = self.ledger.next_number()
        return self.make_point(number, self.proposer.propose(number))

    def _fail(self, point: Point, before: TrialRecord) -> None:
        """Fail a trial that cannot start, because the student before it in the chain is not complete."""
        error = f"{before.name}, which it starts from, {before.status}"
        record = self.ledger.get(point.name) or TrialRecord(
            number=self.ledger.next_number(), name=point.name, out=point.spec.out, values=point.values
        )
        changes = {"status": "failed", "error": error, "has_diverged": before.has_diverged}
        self._say(self.ledger.put(record.model_copy(update=changes)))

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Write down what a trial reports."""
        name, before = self.running[trial_id]
        if "update" in result and not result.get("error"):
            self.ledger.report(name, _report(result), before)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Write down how it ended."""
        if trial_id not in self.running:
            return
        name, before = self.running.pop(trial_id)
        result = result or {}
        if error or result.get("error"):
            why = str(result.get("error") or "its process died")
            has_diverged = bool(result.get("has_diverged"))
            record = self.ledger.change(name, status="failed", error=why, has_diverged=has_diverged)
        else:
            if "update" in result:
                self.ledger.report(name, _report(result), before)
            record = self.ledger.change(name, status="finished" if result.get("is_done") else "stopped")
        if self.proposer is not None:
            self.proposer.tell(record)
        self._say(record)

    def _say(self, record: TrialRecord) -> None:
        """One line for a trial that has ended."""
        self.ended_here += 1
        ended = sum(not known.is_open or known.status == "failed" for known in self.ledger.records)
        metric = self.spec.asha_metric if self.spec.asha_metric in record.metrics else "loss"
        told = [] if metric not in record.metrics else [f"{_words(metric)} {record.metrics[metric]:.4g}"]
        told.append(f"{record.seconds:.0f} s")
        if record.status == "stopped":
            told.insert(0, f"stopped early after {record.updates:,} updates")
        if record.status == "failed":
            told = [f"failed: {record.error}"]
        left = self.total - ended
        if left > 0:
            told.append(f"about {duration((time.perf_counter() - self.started) / self.ended_here * left)} left")
        log.info(f"sweep: {ended} of {self.total} students, {record.name}: {', '.join(told)}")

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has all."""


def _words(metric: str) -> str:
    return metric.rsplit("/", 1)[-1].replace("_", " ")


def _report(result: Mapping[str, Any]) -> dict[str, float]:
    """What the trial itself has put into a result of Tune."""
    names = [name for name in str(result.get("reported", "")).split() if name in result]
    return {name: float(result[name]) for name in ("update", "seconds", *names) if name in result}


class Halving(FIFOScheduler):  # type: ignore[misc]
    """Tune's ASHA with trials known by their names, so that those of an earlier start count in its rungs.

    A trial in its last update is left to end: it has to write its student.

    Args:
        updates: of a whole training, by the trial's name.
        most_updates: where the last rung is below.
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
            known = SimpleNamespace(trial_id=record.name)
            self.asha.on_trial_add(None, known)
            for report in record.reports:
                self.asha.on_trial_result(None, known, report)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial has been made."""
        self.asha.on_trial_add(tune_controller, _named(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether a trial goes on."""
        if result.get("update", 0) >= self.updates(trial.config["trial"]):
            return str(FIFOScheduler.CONTINUE)
        return str(self.asha.on_trial_result(tune_controller, _named(trial), result))


def _named(trial: Any) -> SimpleNamespace:
    return SimpleNamespace(trial_id=trial.config["trial"])


def report_to_tune(metrics: Mapping[str, float], started: float, **more: Any) -> None:
    """Report from a trial, with the names of what is its own."""
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
