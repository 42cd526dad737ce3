"""The sweep stage: checks, adds missing guidance scales, runs trials, evaluates students and writes the report."""

import json
from collections.abc import Sequence

from kac.model import CONFIG_FILE, load_teacher_config
from kac.util import files
from kac.util.errors import DistillKacError
from kac.util.log import log
from pipeline import claims, outputs, store, tracking
from pipeline.cluster import placement, storage
from pipeline.config import EvaluateSpec, RolloutRecipe, RolloutSpec, SweepSpec
from pipeline.distill import (
    check_paths,
    finish_stopped_student,
    plan_student,
    resolve_spec,
    start_student_run,
)
from pipeline.evaluate.compute import try_features
from pipeline.evaluate.evaluate_stage import evaluate
from pipeline.outputs import SPEC_FILE
from pipeline.rollout.rollout_stage import rollout
from pipeline.sweep import checks
from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.planned_trials import PlannedTrial, grid_trials, identity, plan_trial
from pipeline.sweep.proposers import edge_trials
from pipeline.sweep.sweep_report import write_report
from pipeline.sweep.sweep_results import Row
from pipeline.tracking import logged_models
from pipeline.tracking.killed_runs import mark_killed

RESULT_FILE = "trials.json"


def sweep(spec: SweepSpec, parent: tracking.TrackedRun | None = None) -> list[TrialRecord]:
    """Distill every student of the sweep, evaluate the students and write the report.

    A rerun keeps finished trials, and resumes unfinished trials with unchanged values.

    Returns:
        One record per trial.

    Raises:
        DistillKacError: before any trial starts, if the options, the store, the cluster or the folder is unsuitable;
            after all trials have ended, if some failed.
    """
    spec = check_paths(spec, lambda: True)
    planned = edge_trials(spec) if spec.search else grid_trials(spec)
    metric, better = checks.ranking_metric(spec)
    checks.check_options(spec)
    source, missing = checks.check_store(spec, planned)
    # Use the trials' resources instead of this process's resources, so that any process can resume the sweep.
    spec = spec.settled(lambda: checks.resources_per_trial(spec).gpus > 0)
    assert source.manifest is not None
    storage.check_shared({"`teacher`": spec.teacher or source.manifest.teacher}, lambda: True)
    content = {"store": source.manifest.fingerprint, **identity(spec)}
    result = files.join(spec.out, RESULT_FILE)
    if spec.samples and not files.exists(result):
        evaluation_spec = _evaluation_spec(spec, source)
        try_features(evaluation_spec, load_teacher_config(str(evaluation_spec.teacher)).data)
    was_done = not outputs.begin(spec.out, spec, RESULT_FILE, **content)
    ledger = Ledger(spec.out)
    # Plan the trials again, because the settled spec may give different students.
    planned = [plan_trial(spec, r.values, r.name) for r in ledger.records] if spec.search else grid_trials(spec)
    total = max(len(planned), spec.trials) if spec.search else len(planned)
    judged = {"metric": metric, "samples": spec.samples, "features": list(spec.features), "register": spec.register}
    is_complete = was_done and len(ledger.records) == total and all(map(_is_complete, ledger.records))
    if is_complete and json.loads(files.read_bytes(result)).get("judged") == judged:
        log.info(f"sweep: all {total} students in {spec.out} are complete: nothing to do")
        return ledger.records
    claims.take(spec.out)  # outputs.begin does not claim the folder of a finished sweep
    option, count = ("`workers`", spec.workers) if spec.workers else ("`cpus_per_trial`, `gpus_per_trial`", 1)
    placement.wait_for_capacity("sweep", option, count, checks.resources_per_trial(spec))
    fingerprint = spec.fingerprint(**content)
    with tracking.start_run(
        spec=spec,
        fingerprint=fingerprint,
        inputs={"rollout": content["store"]},
        output=spec.out,
        parent=parent,
        datasets=[tracking.LoggedDataset("store", content["store"], spec.store)],
    ) as run:
        if missing:
            _add_scales(spec, source, missing)
        todo = [trial for trial in planned if _is_open(ledger, trial, run)]
        complete = len(planned) - len(todo)
        if todo or len(planned) < total:
            from pipeline.sweep.trials import run_trials

            try:
                run_trials(spec, ledger, todo, total, run)
            except (KeyboardInterrupt, SystemExit):
                # A trial that has not reported yet is still "waiting" in the ledger, but may already have a run.
                _end_runs(ledger, "waiting", "running")
                raise
        _end_runs(ledger, "stopped")
        checks.check_reported(spec, ledger)
        evaluation = _evaluate(spec, ledger, source, run)
        best = write_report(spec, ledger.records, evaluation, run, metric, better)
        if spec.register and best:
            _register(best, spec.register)
        _check_failed(spec, ledger, total)
    students = [record.name for record in ledger.records]
    listing = {"fingerprint": fingerprint, "students": students, "judged": judged}
    files.write_bytes(result, json.dumps(listing, indent=2).encode())
    log.info(f"sweep: wrote {total - complete} students to {spec.out} ({complete} were complete)")
    return ledger.records


def _add_scales(spec: SweepSpec, source: store.Store, missing: Sequence[float]) -> None:
    """Add guidance scales to the store, with the store's recipe and sample ids.

    The rollout's run is not a child of the sweep's run, so a chart of the child runs compares only students.
    """
    manifest = source.manifest
    assert manifest is not None
    recipe = {name: getattr(manifest.identity, name) for name in RolloutRecipe.model_fields}
    for start, stop in manifest.ids(manifest.guidance[0]):
        rollout(
            RolloutSpec(
                teacher=spec.teacher or manifest.teacher,
                store=spec.store,
                first_sample=start,
                trajectories=stop - start,
                guidance=tuple(missing),
                label_selector=spec.label_selector,
                **recipe,
            )
        )


def _is_complete(record: TrialRecord) -> bool:
    has_student = record.status == "finished" and files.exists(files.join(record.out, CONFIG_FILE))
    return has_student or record.status == "stopped"


def _is_open(ledger: Ledger, trial: PlannedTrial, run: tracking.TrackedRun) -> bool:
    """Whether a trial needs training. If its student is already complete, its record becomes "finished".

    A complete student's run becomes a child of the sweep's run.
    """
    record = ledger.get(trial.name)
    if record is not None and record.status == "stopped":
        return False
    student = resolve_spec(trial.spec)
    if trial.after and not files.exists(files.join(student.init, CONFIG_FILE)):
        return True
    plan = plan_student(student)
    if outputs.begin(student.out, student, CONFIG_FILE, **plan.content):
        claims.release(student.out)  # the trial's own process will claim the folder
        return True
    metrics: dict[str, float] = {}
    own = tracking.run_of_output(student.out)
    if own is None:
        with start_student_run(student, plan, run) as new:
            new.tags({"distillkac.path": student.out})
    else:
        own.nest(run)
        # If the sweep was stopped after the student was written but before its trial ended, the run ended as KILLED.
        if record is not None and record.status != "finished":
            finish_stopped_student(student)
        metrics = {name: value for name, value in own.last_metrics().items() if name in checks.REPORTED}
    metrics |= ledger.add(trial).metrics
    ledger.change(trial.name, status="finished", error="", updates=student.optimizer.updates, metrics=metrics)
    return False


def _end_runs(ledger: Ledger, *statuses: str) -> None:
    """Mark the runs of trials with these statuses as KILLED. The runs of trials that were stopped early get a tag."""
    for record in ledger.records:
        run = tracking.run_of_output(record.out) if record.status in statuses else None
        if run is not None:
            if record.status == "stopped":
                run.tags({"distillkac.stopped_early": f"after {record.updates} updates"})
            mark_killed(run)


def _evaluate(spec: SweepSpec, ledger: Ledger, source: store.Store, run: tracking.TrackedRun) -> str | None:
    """Evaluate the finished students in a separate run; return its folder, or None if nothing was evaluated."""
    students = tuple(sorted(record.out for record in ledger.records if record.status == "finished"))
    if not spec.samples or not students:
        return None
    planned = _evaluation_spec(spec, source, students)
    _remove_outdated(planned)
    evaluate(planned)
    own = tracking.run_of_output(planned.out)
    if own is not None:
        run.tags({"distillkac.evaluation": own.run_id})
    return planned.out


def _evaluation_spec(spec: SweepSpec, source: store.Store, students: tuple[str, ...] = ()) -> EvaluateSpec:
    assert source.manifest is not None
    return EvaluateSpec(
        teacher=spec.teacher or source.manifest.teacher,
        students=students,
        out=files.join(spec.out, "evaluation"),
        samples=spec.samples,
        features=spec.features,
        label_selector=spec.label_selector,
    )


def _remove_outdated(planned: EvaluateSpec) -> None:
    """Remove an earlier evaluation if its students or settings differ. The samples stay in the cache."""
    try:
        options = json.loads(files.read_bytes(files.join(planned.out, SPEC_FILE)))["options"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return
    wanted = planned.model_dump(mode="json")
    if any(options.get(name) != wanted[name] for name in ("students", "samples", "features")):
        files.remove_tree(planned.out)


def _register(best: Row, name: str) -> None:
    """Register the best student with the alias ``best``."""
    own = tracking.run_of_output(best.trial.out)
    if own is not None:
        version = logged_models.register(own, name, alias="best")
        log.info(f"sweep: registered {best.name} as models:/{name}@best, version {version}")


def _check_failed(spec: SweepSpec, ledger: Ledger, total: int) -> None:
    """Raise one error for all trials that failed."""
    failed = [record for record in ledger.records if record.status == "failed"]
    if not failed:
        return
    advice = "Run the same command again to retry the trials that did not diverge."
    if any(record.has_diverged for record in failed):
        diverged = (
            "A trial that diverged would diverge again. Remove its values from the sweep or lower "
            "`optimizer.learning_rate`, and choose a new `out`."
        )
        advice = diverged if all(record.has_diverged for record in failed) else f"{diverged} {advice}"
    errors = "; ".join(f"{record.name}: {record.error}" for record in failed)
    raise DistillKacError(f"{spec.out}: {len(failed)} of {total} trials failed: {errors}. {advice}")
