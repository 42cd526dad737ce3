"""Runs the trials of a sweep under Ray Tune. The ledger holds all state, so a restarted sweep resumes from it."""

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from kac.networks.cost import duration
from kac.util.errors import DivergedError, one_line
from kac.util.log import log
from pipeline import tracking
from pipeline.cluster import placement
from pipeline.config import AnySweep
from pipeline.sweep.checks import resources_per_trial
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.planned_trials import UPDATES, PlannedTrial, plan_trial, search_name
from pipeline.sweep.proposers import PROPOSERS, edge_trials
from pipeline.sweep.trial_kind import TrialKind

AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")

WAITING_BYTES = 2**20
"""Bytes of memory that Ray Tune reserves for a trial that only waits for its workers. Tune requires a resource."""

PROCESS_FAILURES = 2
"""Number of restarts of a trial whose process died. Each restart resumes from the trial's checkpoint."""


def run_trials(
    kind: TrialKind, ledger: Ledger, todo: Sequence[PlannedTrial], total: int, run: tracking.TrackedRun
) -> None:
    """Run the trials in ``todo``, then new trials of a search until there are ``total``. The ledger keeps results."""
    # Tune's tables would hide our progress lines. verbose=0 silences only the older reporter, so select that reporter.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    spec = kind.spec
    specs = [trial.spec for trial in todo or edge_trials(spec)]
    resources, concurrent = resources_per_trial(spec), None
    bundle, selector = resources.by_ray_name, dict(resources.label_selector)
    if spec.workers:  # the trial itself reserves no CPU, because its workers may need every CPU of the cluster
        bundle, selector = {"memory": WAITING_BYTES}, {}
        concurrent = max(1, int(placement.capacity(resources)) // spec.workers)
    bundles = tune.PlacementGroupFactory([bundle], **({"bundle_label_selector": [selector]} if selector else {}))
    trainable = tune.with_parameters(_trial, kind=kind, shared=kind.share(specs), run=run)
    most_updates = max(trained.optimizer.updates for trained in specs)
    # Tune's own files are not needed to resume: checkpoints are in the models' folders, other state is in the ledger.
    with tempfile.TemporaryDirectory(prefix="distillkac-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, bundles),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearch(spec, ledger, todo, total, kind.noun),
                scheduler=LedgerASHA(spec, ledger, most_updates) if spec.asha else None,
                num_samples=max(1, len(todo) + max(0, total - len(ledger.records))),
                max_concurrent_trials=concurrent,
                reuse_actors=not spec.workers,  # so later trials need not import modules and read the store again
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=PROCESS_FAILURES),
            ),
        )
        # Tune would copy these keys into the trials' runtime environment (tune/execution/class_cache.py), which Ray's
        # agent writes into its log. Trials get their keys from their nodes.
        hidden = {name: os.environ.pop(name) for name in AWS_KEYS if name in os.environ}
        try:
            tuner.fit()
        finally:
            os.environ.update(hidden)


def _trial(config: dict[str, Any], kind: TrialKind, shared: Sequence[ray.ObjectRef], run: tracking.TrackedRun) -> None:
    """Run one trial in a process of Ray Tune. The trial trains in this process, or on its own Ray Train workers."""
    placement.hide_unassigned_gpus()
    spec = kind.spec.trained(**json.loads(config["spec"]))
    started = time.perf_counter()
    metrics: dict[str, float] = {}

    def report(latest: Mapping[str, float], **state: Any) -> None:
        """Report the latest value of every metric, and the state of the trial."""
        metrics.update(latest)
        names = " ".join(name for name in metrics if name != "update")
        tune.report({"update": 0.0, **metrics, "seconds": time.perf_counter() - started, "reported": names, **state})

    inputs = ray.get(list(shared))  # Tune restarts the trial if a node with the inputs is lost
    try:
        if updates := kind.measured_updates(spec):
            tune.report({"measured_updates": updates})  # returns after the driver has written the number to the ledger
            spec = spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update={"updates": updates})})
            started = time.perf_counter()
        kind.train(spec, run, report, inputs)
    except Exception as error:  # noqa: BLE001 - Tune would restart the trial, which would fail again
        report({}, error=one_line(error), has_diverged=isinstance(error, DivergedError))
        return
    report({"update": float(spec.optimizer.updates)}, is_done=True)


class LedgerSearch(Searcher):  # type: ignore[misc]
    """A searcher for Tune. It starts the planned trials in order, then trials with values from the search algorithm.

    The searcher writes each report and the end of each trial to the ledger. ``total`` is the sweep's number of trials.
    """

    def __init__(
        self, spec: AnySweep, ledger: Ledger, planned: Sequence[PlannedTrial], total: int, noun: str = "student"
    ) -> None:
        super().__init__()
        self.noun = noun
        self.spec, self.ledger, self.waiting, self.total = spec, ledger, list(planned), total
        self.proposer = PROPOSERS[spec.searcher](spec, ledger) if spec.search else None
        self.running: dict[str, tuple[str, float]] = {}  # by Tune's id: name, and seconds of earlier starts
        self.started, self.ended_here = time.perf_counter(), 0

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial, None if all remaining trials are waiting for other trials, or FINISHED."""
        trial = self._next()
        if trial is None:
            return None if self.waiting else Searcher.FINISHED
        self.running[trial_id] = (trial.name, self.ledger.add(trial).seconds)
        self.ledger.change(trial.name, status="waiting", error="", has_diverged=False)
        return {"trial": trial.name, "updates": trial.spec.optimizer.updates, "spec": trial.spec.model_dump_json()}

    def _next(self) -> PlannedTrial | None:
        for trial in list(self.waiting):
            # Until a predecessor is retried, its record has the status of its last attempt.
            will_be_retried = any(other.name == trial.after for other in self.waiting)
            predecessor = self.ledger.get(trial.after) if trial.after and not will_be_retried else None
            if predecessor is not None and predecessor.status in {"failed", "stopped"}:
                self.waiting.remove(trial)
                self.ledger.add(trial)
                error = f"its predecessor {predecessor.name} {predecessor.status}"
                self._end(trial.name, status="failed", error=error, has_diverged=predecessor.has_diverged)
            elif trial.after is None or (predecessor is not None and predecessor.status == "finished"):
                self.waiting.remove(trial)
                return trial
        if self.proposer is None or self.waiting or len(self.ledger.records) >= self.spec.trials:
            return None
        number = self.ledger.next_number()
        return plan_trial(self.spec, self.proposer.propose(number), search_name(number))

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Add a report to the ledger."""
        name, base_seconds = self.running[trial_id]
        if "measured_updates" in result:
            record = self.ledger.get(name)
            assert record is not None
            self.ledger.change(name, values={**record.values, UPDATES: int(result["measured_updates"])})
        if "update" in result and not result.get("error"):
            # Keep only the entries that the trial reported. Ray Tune adds other entries.
            own = ("update", "seconds", *str(result.get("reported", "")).split())
            self.ledger.report(name, {key: float(result[key]) for key in own if key in result}, base_seconds)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Record the end of a trial."""
        if trial_id not in self.running:
            return
        result = result or {}
        changes: dict[str, Any] = {"status": "finished" if result.get("is_done") else "stopped"}
        if error or result.get("error"):
            message = str(result.get("error") or "its process died")
            changes = {"status": "failed", "error": message, "has_diverged": bool(result.get("has_diverged"))}
        else:
            self.on_trial_result(trial_id, result)
        self._end(self.running.pop(trial_id)[0], **changes)

    def _end(self, name: str, **changes: Any) -> None:
        """Write the end of a trial to the ledger and log it."""
        record = self.ledger.change(name, **changes)
        if self.proposer is not None:
            self.proposer.observe(record)
        self.ended_here += 1
        ended = sum(not other.is_open or other.status == "failed" for other in self.ledger.records)
        left = (self.total - ended) * (time.perf_counter() - self.started) / self.ended_here
        remaining = f", about {duration(left)} left" if left > 0 else ""
        loss = f"loss {record.metrics['loss']:.4g}" if "loss" in record.metrics else "no loss"
        outcome = record.error or f"{loss} after {record.updates:,} updates and {record.seconds:.0f} s"
        log.info(f"sweep: {ended} of {self.total} {self.noun}s, {name}: {record.status}, {outcome}{remaining}")

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger holds all state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger holds all state."""


class LedgerASHA(FIFOScheduler):  # type: ignore[misc]
    """Tune's ASHA (asynchronous successive halving). Its rungs also count trials from earlier starts of the sweep.

    A trial at its last update always continues, because it has to write its model. The last rung is below
    ``most_updates``, the number of updates of the longest trial.
    """

    def __init__(self, spec: AnySweep, ledger: Ledger, most_updates: int) -> None:
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
        """Return CONTINUE or STOP for a trial that has reported."""
        if result.get("update", 0) >= trial.config["updates"]:
            return str(FIFOScheduler.CONTINUE)
        named = SimpleNamespace(trial_id=trial.config["trial"])
        return str(self.asha.on_trial_result(tune_controller, named, result))
