"""The sweep stage: checks, adds missing inputs, runs trials, evaluates their models and writes the report."""

import json
from typing import Any

from kac.model import CONFIG_FILE, load_config
from kac.util import files
from kac.util.errors import DistillKacError
from kac.util.log import log
from pipeline import claims, outputs, tracking
from pipeline.cluster import placement
from pipeline.config import AnySweep, EvaluateSpec, SweepSpec
from pipeline.evaluate.compute import try_features
from pipeline.evaluate.evaluate_stage import draw_samples, evaluate
from pipeline.outputs import SPEC_FILE
from pipeline.sweep import checks
from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.planned_trials import PlannedTrial, grid_trials, identity, plan_trial
from pipeline.sweep.proposers import edge_trials
from pipeline.sweep.student_trials import StudentTrials
from pipeline.sweep.sweep_report import write_report
from pipeline.sweep.sweep_results import Row
from pipeline.sweep.teacher_trials import TeacherTrials
from pipeline.sweep.trial_kind import TrialKind
from pipeline.tracking import logged_models
from pipeline.tracking.killed_runs import mark_killed

RESULT_FILE = "trials.json"

EVALUATED = ("samples", "features", "solver", "solver_steps", "knot_grid", "time_factor")
"""Options that determine the samples and metrics of an evaluation."""

JUDGED = ("metric", "register", *EVALUATED)
"""Options that affect only the evaluation and the report. If one of them differs, a rerun repeats these parts."""


def sweep(spec: AnySweep, parent: tracking.TrackedRun | None = None) -> list[TrialRecord]:
    """Train every student or teacher of the sweep, evaluate them and write the report.

    A rerun keeps finished trials, and resumes unfinished trials with unchanged values.

    Returns:
        One record per trial.

    Raises:
        DistillKacError: before any trial starts, if the options, the inputs, the cluster or the folder is unsuitable;
            after all trials have ended, if some failed.
    """
    kind: TrialKind = StudentTrials(spec) if isinstance(spec, SweepSpec) else TeacherTrials(spec)
    spec = kind.spec
    planned = edge_trials(spec) if spec.search else grid_trials(spec)
    metric, better = checks.ranking_metric(spec)
    checks.check_options(spec, planned)
    kind.check(planned)
    # Use the trials' resources instead of this process's resources, so that any process can resume the sweep.
    kind.spec = spec = spec.settled(lambda: checks.resources_per_trial(spec).gpus > 0)
    content = {**kind.inputs, **identity(spec)}
    result = files.join(spec.out, RESULT_FILE)
    if spec.samples and not files.exists(result):
        try_features(kind.evaluations([files.join(spec.out, "trial")])[0], kind.data())
    was_done = not outputs.begin(spec.out, spec, RESULT_FILE, **content)
    ledger = Ledger(spec.out)
    # Plan the trials again, because the settled spec may give different students.
    if spec.search:
        planned = [plan_trial(spec, record.values, record.name) for record in ledger.records]
    else:
        planned = [kind.replan(trial, ledger) for trial in grid_trials(spec)]
    total = max(len(planned), spec.trials) if spec.search else len(planned)
    judged = {name: getattr(spec, name) for name in JUDGED if hasattr(spec, name)}
    judged |= {"metric": metric, "features": list(spec.features)}
    is_complete = was_done and len(ledger.records) == total and all(map(_is_complete, ledger.records))
    if is_complete and _judged_before(result, spec).items() >= judged.items():
        log.info(f"sweep: all {total} {kind.noun}s in {spec.out} are complete: nothing to do")
        return ledger.records
    claims.take(spec.out)  # outputs.begin does not claim the folder of a finished sweep
    option, count = ("`workers`", spec.workers) if spec.workers else ("`cpus_per_trial`, `gpus_per_trial`", 1)
    placement.wait_for_capacity("sweep", option, count, checks.resources_per_trial(spec))
    fingerprint = spec.fingerprint(**content)
    with tracking.start_run(
        spec=spec,
        fingerprint=fingerprint,
        inputs={kind.made_by: kind.dataset.digest},
        output=spec.out,
        parent=parent,
        datasets=[kind.dataset],
    ) as run:
        kind.add_inputs()
        todo = [trial for trial in planned if _is_open(kind, ledger, trial, run)]
        complete = len(planned) - len(todo)
        if todo or len(planned) < total:
            from pipeline.sweep.trials import run_trials

            try:
                run_trials(kind, ledger, todo, total, run)
            except (KeyboardInterrupt, SystemExit):
                # A trial that has not reported yet is still "waiting" in the ledger, but may already have a run.
                _end_runs(ledger, "waiting", "running")
                raise
        _end_runs(ledger, "stopped")
        checks.check_reported(spec, ledger)
        evaluations = _evaluate(kind, ledger, run)
        best = write_report(spec, ledger.records, evaluations, run, metric, better)
        if spec.register and best:
            _register(best, spec.register)
        _check_failed(spec, ledger, total)
    names = [record.name for record in ledger.records]
    listing = {"fingerprint": fingerprint, f"{kind.noun}s": names, "judged": judged}
    files.write_bytes(result, json.dumps(listing, indent=2).encode())
    log.info(f"sweep: wrote {total - complete} {kind.noun}s to {spec.out} ({complete} were complete)")
    return ledger.records


def _judged_before(result: str, spec: AnySweep) -> dict[str, Any]:
    """The values of ``JUDGED`` in a result. Options that an older version did not have get their defaults."""
    defaults = {name: field.default for name, field in type(spec).model_fields.items() if name in JUDGED}
    return {**defaults, **json.loads(files.read_bytes(result)).get("judged", {})}


def _is_complete(record: TrialRecord) -> bool:
    has_model = record.status == "finished" and files.exists(files.join(record.out, CONFIG_FILE))
    return has_model or record.status == "stopped"


def _is_open(kind: TrialKind, ledger: Ledger, trial: PlannedTrial, run: tracking.TrackedRun) -> bool:
    """Whether a trial needs training. If its model is already complete, its record becomes "finished".

    A complete model's run becomes a child of the sweep's run.
    """
    record = ledger.get(trial.name)
    if record is not None and record.status == "stopped":
        return False
    resolved = kind.resolve(trial)
    if resolved is None:
        return True
    spec, content, start_run, finish = resolved
    if outputs.begin(spec.out, spec, CONFIG_FILE, **content):
        claims.release(spec.out)  # the trial's own process will claim the folder
        return True
    metrics: dict[str, float] = {}
    own = tracking.run_of_output(spec.out)
    if own is None:
        with start_run(run) as new:
            new.tags({"distillkac.path": spec.out})
    else:
        own.nest(run)
        # If the sweep was stopped after the model was written but before its trial ended, the run ended as KILLED.
        if record is not None and record.status != "finished":
            finish()
        metrics = {name: value for name, value in own.last_metrics().items() if name in checks.REPORTED}
    metrics |= ledger.add(trial).metrics
    ledger.change(trial.name, status="finished", error="", updates=spec.optimizer.updates, metrics=metrics)
    return False


def _end_runs(ledger: Ledger, *statuses: str) -> None:
    """Mark the runs of trials with these statuses as KILLED. The runs of trials that were stopped early get a tag."""
    for record in ledger.records:
        run = tracking.run_of_output(record.out) if record.status in statuses else None
        if run is not None:
            if record.status == "stopped":
                run.tags({"distillkac.stopped_early": f"after {record.updates} updates"})
            mark_killed(run)


def _evaluate(kind: TrialKind, ledger: Ledger, run: tracking.TrackedRun) -> list[str]:
    """Evaluate the finished models in separate runs; return the folders of the evaluations."""
    folders = sorted(record.out for record in ledger.records if record.status == "finished")
    if not kind.spec.samples or not folders:
        return []
    planned = kind.evaluations(folders)
    for each in planned:
        _remove_outdated(each)
    draw_samples(planned)
    for each in planned:
        evaluate(each, is_part=len(planned) > 1)
    if runs := [own.run_id for each in planned if (own := tracking.run_of_output(each.out))]:
        run.tags({"distillkac.evaluation": " ".join(runs)})
    return [each.out for each in planned]


def _remove_outdated(planned: EvaluateSpec) -> None:
    """Remove an earlier evaluation if its models or settings differ. The samples stay in the cache."""
    try:
        options = json.loads(files.read_bytes(files.join(planned.out, SPEC_FILE)))["options"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return
    wanted, fields = planned.model_dump(mode="json"), EvaluateSpec.model_fields
    # An older version's evaluation lacks newer options, which then had their defaults.
    if any(options.get(name, fields[name].default) != wanted[name] for name in ("students", "steps", *EVALUATED)):
        files.remove_tree(planned.out)


def _register(best: Row, name: str) -> None:
    """Register the best model with the alias ``best``."""
    own = tracking.run_of_output(best.trial.out)
    if own is not None:
        config = load_config(best.trial.out)
        # Training logs every student as a model, but no teacher.
        model = logged_models.log_model(own, best.trial.out, config, {}) if config.kind == "teacher" else None
        version = logged_models.register(own, name, alias="best", model=model)
        log.info(f"sweep: registered {best.name} as models:/{name}@best, version {version}")


def _check_failed(spec: AnySweep, ledger: Ledger, total: int) -> None:
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
