"""Runs the trials of a sweep under Ray Tune: their resources, their shared data, and the process of one trial."""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kac.util.errors import DivergedError, one_line
from pipeline import store, tracking
from pipeline.cluster import connection as cluster
from pipeline.cluster import placement
from pipeline.config import DistillSpec, SweepSpec
from pipeline.distill import distill, objective_of
from pipeline.store import sharing
from pipeline.store.order import rows_of
from pipeline.sweep import space
from pipeline.sweep.checks import resources_per_trial
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.space import Point

AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")

WAITING_BYTES = 2**20
"""Memory that Ray Tune reserves for a trial that only waits for its workers; Tune requires some resource."""

PROCESS_FAILURES = 2
"""Restarts per trial whose process died. Each restart resumes from the trial's checkpoint."""


def run_trials(spec: SweepSpec, ledger: Ledger, todo: Sequence[Point], total: int, run: tracking.TrackedRun) -> None:
    """Run the trials of ``todo``, then new trials of a search until there are ``total``. Results go to the ledger."""
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner

    from pipeline.sweep.search import Halving, LedgerSearch

    # Tune's tables would bury our progress lines; verbose=0 silences only Tune's older reporter.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    resources = cluster.connect()
    # A trial with Ray Train workers reserves no CPU, because its workers may need every CPU of the cluster.
    share, waiting = resources_per_trial(spec, resources), {"memory": WAITING_BYTES}
    selector = dict(spec.label_selector)
    bundles = tune.PlacementGroupFactory(
        [waiting if spec.workers else share.resources],
        **({"bundle_label_selector": [selector]} if selector and not spec.workers else {}),
    )
    concurrent = max(1, int(placement.room(placement.alive(), share)) // spec.workers) if spec.workers else None
    searcher = LedgerSearch(
        spec,
        ledger,
        todo,
        total,
        _proposer(spec, ledger),
        lambda number, values: space.drawn_point(spec, number, values),
    )
    specs = [point.spec for point in todo] or [point.spec for point in space.sample_points(spec)]
    most_updates = max(student.optimizer.updates for student in specs)
    updates = {point.name: point.spec.optimizer.updates for point in todo}
    scheduler = Halving(spec, ledger, lambda name: updates.get(name, most_updates), most_updates) if spec.asha else None
    shared = _share_columns(spec, specs)
    # Tune's own files are not needed to resume: checkpoints are in the students' folders, the rest is in the ledger.
    with tempfile.TemporaryDirectory(prefix="distillkac-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = Tuner(
            tune.with_resources(tune.with_parameters(_trial, shared=shared, run=run), bundles),
            tune_config=TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=max(1, len(todo) + max(0, total - len(ledger.records))),
                max_concurrent_trials=concurrent,
                reuse_actors=not spec.workers,  # saves the imports and the first read of each trial
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                failure_config=FailureConfig(max_failures=PROCESS_FAILURES),
            ),
        )
        with _without_aws_keys():
            tuner.fit()


def _proposer(spec: SweepSpec, ledger: Ledger) -> Any:
    from pipeline.sweep.search import Optuna, RandomSearch

    if not spec.search:
        return None
    distributions = space.distributions_of(spec)
    if spec.searcher == "optuna":
        return Optuna(distributions, spec.seed, spec.asha_metric, ledger, spec.out)
    return RandomSearch(distributions, spec.seed)


def _share_columns(spec: SweepSpec, students: Sequence[DistillSpec]) -> list[sharing.SharedColumns]:
    """Put the columns that the students read into Ray's object store, once per node for all trials.

    Returns an empty list if the columns do not fit ``memory_gib`` or the object store. Each trial then reads the store.
    """
    import ray

    source = store.open(spec.store)
    wanted = [
        source.without_last(s.held_out_rows).selection(
            objective_of(s), source.guidance if s.guidance == "all" else s.guidance
        )
        for s in students
    ]
    selections = sharing.merge_selections(wanted)
    size = sum(rows_of(selection.shards) * selection.row_bytes for selection in selections)
    shared_memory = min(node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"])
    if spec.workers or size > min(spec.memory_gib * 2**30, 0.8 * shared_memory):
        return []
    shared = []
    for selection in selections:
        columns = sharing.load_shared(selection)
        shared.append(
            sharing.SharedColumns(selection, {name: ray.put(array) for name, array in columns.arrays.items()})
        )
    return shared


@contextmanager
def _without_aws_keys() -> Iterator[None]:
    """Hide AWS keys from Ray Tune while the trials run; trials get their keys from their node.

    Tune copies the keys from this process into the runtime environment of the trials
    (tune/execution/class_cache.py), and Ray's agent writes the runtime environment into its log.
    """
    hidden = {name: os.environ.pop(name) for name in AWS_KEYS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _trial(config: dict[str, Any], shared: Sequence[sharing.SharedColumns], run: tracking.TrackedRun) -> None:
    """One trial, in a process of Ray Tune. Training runs in this process, or on Ray Train workers of the trial."""
    import ray

    from pipeline.sweep.search import report_to_tune

    spec = DistillSpec(**json.loads(config["spec"]))
    started, last = time.perf_counter(), {"update": 0.0}

    def report(metrics: Mapping[str, float]) -> None:
        last.update(metrics)
        report_to_tune(last, started)

    arrays = [
        sharing.SharedColumns(columns.selection, {k: ray.get(ref) for k, ref in columns.arrays.items()})
        for columns in shared
    ]
    try:
        with sharing.use_shared(arrays):
            distill(spec, run, on_report=report, is_trial=True)
    except Exception as error:  # noqa: BLE001 - Tune would restart a trial that raises, and it would fail again
        report_to_tune(last, started, error=one_line(error), has_diverged=isinstance(error, DivergedError))
        return
    last["update"] = float(spec.optimizer.updates)
    report_to_tune(last, started, is_done=True)
