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
from pipeline.cluster import placement
from pipeline.config import DistillSpec, SweepSpec
from pipeline.distill import distill, objective_of
from pipeline.store import sharing
from pipeline.store.order import rows_of
from pipeline.sweep.checks import resources_per_trial
from pipeline.sweep.ledger import Ledger
from pipeline.sweep.planned_trials import PlannedTrial
from pipeline.sweep.search_space import edge_trials

AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")

WAITING_BYTES = 2**20
"""Memory that Ray Tune reserves for a trial that only waits for its workers; Tune requires some resource."""

PROCESS_FAILURES = 2
"""Restarts per trial whose process died. Each restart resumes from the trial's checkpoint."""


def run_trials(
    spec: SweepSpec, ledger: Ledger, todo: Sequence[PlannedTrial], total: int, run: tracking.TrackedRun
) -> None:
    """Run the trials of ``todo``, then new trials of a search until there are ``total``. Results go to the ledger."""
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner

    from pipeline.sweep.early_stopping import LedgerASHA
    from pipeline.sweep.ledger_search import LedgerSearch

    # Tune's tables would bury our progress lines; verbose=0 silences only Tune's older reporter.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # A trial with Ray Train workers reserves no CPU, because its workers may need every CPU of the cluster.
    share, waiting = resources_per_trial(spec), {"memory": WAITING_BYTES}
    selector = dict(spec.label_selector)
    bundles = tune.PlacementGroupFactory(
        [waiting if spec.workers else share.by_ray_name],
        **({"bundle_label_selector": [selector]} if selector and not spec.workers else {}),
    )
    concurrent = max(1, int(placement.capacity(share)) // spec.workers) if spec.workers else None
    students = [trial.spec for trial in todo or edge_trials(spec)]
    most_updates = max(student.optimizer.updates for student in students)
    shared = _share_columns(spec, students)
    # Tune's own files are not needed to resume: checkpoints are in the students' folders, the rest is in the ledger.
    with tempfile.TemporaryDirectory(prefix="distillkac-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = Tuner(
            tune.with_resources(tune.with_parameters(_trial, shared=shared, run=run), bundles),
            tune_config=TuneConfig(
                search_alg=LedgerSearch(spec, ledger, todo, total),
                scheduler=LedgerASHA(spec, ledger, most_updates) if spec.asha else None,
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
    return [
        sharing.SharedColumns(s, {name: ray.put(array) for name, array in sharing.load_shared(s).arrays.items()})
        for s in selections
    ]


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
    from ray import tune

    spec = DistillSpec(**json.loads(config["spec"]))
    started = time.perf_counter()
    metrics: dict[str, float] = {}

    def report(
        latest: Mapping[str, float], *, is_done: bool = False, error: str = "", has_diverged: bool = False
    ) -> None:
        """Report the latest value of every metric, and the state of the trial."""
        metrics.update(latest)
        names = " ".join(name for name in metrics if name != "update")
        state = {"is_done": is_done, "error": error, "has_diverged": has_diverged, "reported": names}
        tune.report({"update": 0.0, **metrics, "seconds": time.perf_counter() - started, **state})

    arrays = [
        sharing.SharedColumns(columns.selection, {k: ray.get(ref) for k, ref in columns.arrays.items()})
        for columns in shared
    ]
    try:
        with sharing.use_shared(arrays):
            distill(spec, run, on_report=report, is_trial=True)
    except Exception as error:  # noqa: BLE001 - Tune would restart a trial that raises, and it would fail again
        report({}, error=one_line(error), has_diverged=isinstance(error, DivergedError))
        return
    report({"update": float(spec.optimizer.updates)}, is_done=True)
