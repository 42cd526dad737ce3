"""The trials of a sweep under Ray Tune: what each takes, what they share, and what runs in the process of one."""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kac.util.errors import DivergedError, one_line
from pipeline import distill, store, tracking
from pipeline.cluster import connection as cluster
from pipeline.cluster import placement
from pipeline.config.specs import DistillSpec, SweepSpec
from pipeline.store import sharing
from pipeline.store.order import rows_of
from pipeline.sweep import space
from pipeline.sweep.checks import share_of_trial
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.space import Point

AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")

WAITING_BYTES = 2**20
"""Tune wants to reserve something for a trial that only waits for its workers."""

PROCESS_FAILURES = 2
"""So many times a trial whose process died is started again within a sweep; it goes on from its checkpoint."""


def run_trials(spec: SweepSpec, ledger: Ledger, todo: Sequence[Point], total: int, run: tracking.TrackedRun) -> None:
    """Run the trials of ``todo``, and new ones of a search up to ``total``; what becomes of them is in the ledger."""
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner

    from pipeline.sweep.search import Halving, LedgerSearch

    # Tune's tables would bury the trials' progress; verbose=0 silences only its older reporter.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    resources = cluster.connect()
    # A trial that starts Ray Train workers holds no part of a CPU, or they would wait for it where they need them all.
    share, waits = share_of_trial(spec, resources), {"memory": WAITING_BYTES}
    selector = dict(spec.label_selector)
    needs = tune.PlacementGroupFactory(
        [waits if spec.workers else share.resources],
        **({"bundle_label_selector": [selector]} if selector and not spec.workers else {}),
    )
    side_by_side = max(1, int(placement.room(placement.alive(), share)) // spec.workers) if spec.workers else None
    searcher = LedgerSearch(
        spec,
        ledger,
        todo,
        total,
        _proposer(spec, ledger),
        lambda number, values: space.drawn_point(spec, number, values),
    )
    specs = [point.spec for point in todo] or [point.spec for point in space.sample_points(spec)]
    most = max(student.optimizer.updates for student in specs)
    updates = {point.name: point.spec.optimizer.updates for point in todo}
    scheduler = Halving(spec, ledger, lambda name: updates.get(name, most), most) if spec.asha else None
    loans = _lend(spec, specs)
    # Tune's own records are scratch: what a trial needs to go on lies in its student's folder, the rest in the ledger.
    with tempfile.TemporaryDirectory(prefix="distillkac-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = Tuner(
            tune.with_resources(tune.with_parameters(_trial, loans=loans, run=run), needs),
            tune_config=TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=max(1, len(todo) + max(0, total - len(ledger.records))),
                max_concurrent_trials=side_by_side,
                # The next trial of a process has its imports and its first read behind it.
                reuse_actors=not spec.workers,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                failure_config=FailureConfig(max_failures=PROCESS_FAILURES),
            ),
        )
        with _keys_out_of_sight():
            tuner.fit()


def _proposer(spec: SweepSpec, ledger: Ledger) -> Any:
    from pipeline.sweep.search import Optuna, RandomDraws

    if not spec.search:
        return None
    draws = space.draws_of(spec)
    if spec.searcher == "optuna":
        return Optuna(draws, spec.seed, spec.asha_metric, ledger, spec.out)
    return RandomDraws(draws, spec.seed)


def _lend(spec: SweepSpec, students: Sequence[DistillSpec]) -> list[sharing.Loan]:
    """The columns that the students read, once in the memory that the processes of a node share.

    None where they do not fit ``memory_gib`` or Ray's object store: there every trial reads for itself.
    """
    import ray

    source = store.open(spec.store)
    wanted = [
        source.without_last(s.held_out_rows).selection(
            distill.objective_of(s), source.guidance if s.guidance == "all" else s.guidance
        )
        for s in students
    ]
    united = sharing.united(wanted)
    size = sum(rows_of(one.shards) * one.row_bytes for one in united)
    shared_memory = min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"])
    if spec.workers or size > min(spec.memory_gib * 2**30, 0.8 * shared_memory):
        return []
    loans = []
    for selection in united:
        loan = sharing.lent_columns(selection)
        loans.append(sharing.Loan(selection, {name: ray.put(array) for name, array in loan.arrays.items()}))
    return loans


@contextmanager
def _keys_out_of_sight() -> Iterator[None]:
    """Without AWS keys in this process's environment: Ray Tune copies them into the runtime environment of its trials
    (tune/execution/class_cache.py), and Ray's agent writes that into its log. Trials have them from their node."""
    hidden = {name: os.environ.pop(name) for name in AWS_KEYS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _trial(config: dict[str, Any], loans: Sequence[sharing.Loan], run: tracking.TrackedRun) -> None:
    """One trial, in a process of Tune: the training loop runs right here, or on Ray Train workers of its own."""
    import ray

    from pipeline.sweep.search import report_to_tune

    spec = DistillSpec(**json.loads(config["spec"]))
    started, last = time.perf_counter(), {"update": 0.0}

    def report(metrics: Mapping[str, float]) -> None:
        last.update(metrics)
        report_to_tune(last, started)

    arrays = [sharing.Loan(loan.selection, {k: ray.get(ref) for k, ref in loan.arrays.items()}) for loan in loans]
    try:
        with sharing.borrowing(arrays):
            distill.distill(spec, run, on_report=report)
    except Exception as error:  # noqa: BLE001 - Tune starts again what raises; this would only fail again
        report_to_tune(last, started, error=one_line(error), has_diverged=isinstance(error, DivergedError))
        return
    last["update"] = float(spec.optimizer.updates)
    report_to_tune(last, started, is_done=True)
