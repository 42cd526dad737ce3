"""The stage: check everything, add what the store lacks, run the trials, judge the students, answer."""

import json
from collections.abc import Sequence
from typing import Any

from kac.model import CONFIG_FILE, load_teacher_config
from kac.util import files
from kac.util.errors import DistillKacError
from kac.util.log import log
from pipeline import claims, distill, outputs, store, tracking
from pipeline.cluster import connection as cluster
from pipeline.cluster import storage
from pipeline.config.specs import DistillSpec, EvaluateSpec, RolloutRecipe, RolloutSpec, SweepSpec
from pipeline.evaluate.feature_trial import try_features
from pipeline.evaluate.inputs import ANSWER_FILE
from pipeline.outputs import SPEC_FILE
from pipeline.sweep import checks, space
from pipeline.sweep.answer import write_answer
from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.space import Point
from pipeline.sweep.trials import run_trials

RESULT_FILE = "trials.json"
EVALUATION = "evaluation"


def sweep(spec: SweepSpec, parent: tracking.TrackedRun | None = None) -> list[TrialRecord]:
    """Distill every student of the sweep, judge them and write the answer.

    What is finished stays as it is, what is not goes on, with the values that it had.

    Returns:
        A record a trial.

    Raises:
        DistillKacError: the options, the store, the cluster or the folder do not fit (before any trial starts), or
            trials failed (after all others have ended).
    """
    spec = distill.absolute(spec)
    distill.check_storage(spec, lambda: True)
    points = space.sample_points(spec) if spec.search else space.grid_points(spec)
    metric, better = checks.judged_by(spec)
    checks.check_options(spec)
    checks.check_validated(spec)
    source, missing = checks.check_store(spec, points)
    # Where the trials run decides, not this process: whoever resumes the sweep must come to the same students.
    spec = spec.settled(lambda: checks.gpus_a_trial(spec, cluster.connect()) > 0)
    assert source.manifest is not None
    storage.check_shared({"`teacher`": spec.teacher or source.manifest.teacher}, lambda: True)
    content = {"store": source.manifest.fingerprint, **space.identity(spec)}
    if spec.samples and not files.exists(files.join(spec.out, RESULT_FILE)):
        judge = _evaluation_spec(spec, source)
        try_features(judge, load_teacher_config(str(judge.teacher)).data)
    was_done = not outputs.begin(spec.out, spec, RESULT_FILE, **content)
    ledger = Ledger(spec.out)
    points = _recorded_points(spec, ledger) if spec.search else space.grid_points(spec)
    total = max(len(points), spec.trials) if spec.search else len(points)
    judged = {"metric": metric, "samples": spec.samples, "features": list(spec.features), "register": spec.register}
    if was_done and _is_complete(ledger, points, total) and _read_result(spec.out).get("judged") == judged:
        log.info(f"sweep: all {total} students in {spec.out} are complete: nothing to do")
        return ledger.records
    claims.take(spec.out)  # a finished sweep that gets more trials has none yet
    checks.await_room(spec)
    inputs = {"rollout": content["store"]}
    fingerprint = spec.fingerprint(**content)
    read = [tracking.Dataset("store", content["store"], spec.store)]
    with tracking.start_run(
        spec=spec, fingerprint=fingerprint, inputs=inputs, output=spec.out, parent=parent, datasets=read
    ) as run:
        if missing:
            _add_scales(spec, source, missing)
        todo = [point for point in points if _is_open(ledger, point, run)]
        complete = len(points) - len(todo)
        if todo or len(points) < total:
            try:
                run_trials(spec, ledger, todo, total, run)
            except (KeyboardInterrupt, SystemExit):
                _close_open(ledger)
                raise
        _close_stopped(ledger)
        checks.check_reported(spec, ledger)
        evaluation = _evaluate(spec, ledger, source, run)
        _answer(spec, ledger, evaluation, run, metric, better)
        _check_failed(spec, ledger, total)
    students = [record.name for record in ledger.records]
    listing = {"fingerprint": fingerprint, "students": students, "judged": judged}
    files.write_bytes(files.join(spec.out, RESULT_FILE), json.dumps(listing, indent=2).encode())
    log.info(f"sweep: wrote {total - complete} students to {spec.out} ({complete} were complete)")
    return ledger.records


def _add_scales(spec: SweepSpec, source: store.Store, missing: Sequence[float]) -> None:
    """Add guidance scales to the store by its own recipe, with the trajectories that it has of the others.

    Its run is no child of the sweep's: those are the trials alone, and a chart over them compares students.
    """
    from pipeline.rollout import rollout

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


def _check_failed(spec: SweepSpec, ledger: Ledger, total: int) -> None:
    """Raise one error for all trials that failed."""
    failed = [record for record in ledger.records if record.status == "failed"]
    if not failed:
        return
    advice = []
    if any(record.has_diverged for record in failed):
        advice.append(
            "A trial that diverged would diverge again: sweep without its values, or lower `optimizer.learning_rate`, "
            "and give a new `out`."
        )
    if not all(record.has_diverged for record in failed):
        advice.append("Run the same command again to retry the trials that failed for another reason.")
    raise DistillKacError(
        f"{spec.out}: {len(failed)} of {total} trials failed: "
        f"{'; '.join(f'{record.name}: {record.error}' for record in failed)}. {' '.join(advice)}"
    )


def _read_result(out: str) -> dict[str, Any]:
    """What a finished sweep has left."""
    found: dict[str, Any] = json.loads(files.read_bytes(files.join(out, RESULT_FILE)))
    return found


def _is_complete(ledger: Ledger, points: Sequence[Point], total: int) -> bool:
    """Whether every trial has ended and its student, if it is to have one, is there."""
    records = [ledger.get(point.name) for point in points]
    return len(points) == total and all(
        record is not None and (record.status == "stopped" or (not record.is_open and _has_student(record.out)))
        for record in records
    )


def _has_student(out: str) -> bool:
    return files.exists(files.join(out, CONFIG_FILE))


def _recorded_points(spec: SweepSpec, ledger: Ledger) -> list[Point]:
    """The trials that a search has begun."""
    return [space.make_point(spec, record.values, record.name) for record in ledger.records]


def _is_open(ledger: Ledger, point: Point, run: tracking.TrackedRun) -> bool:
    """Whether there is something to do for a point; a student that was complete before has its record from here on.

    Raises:
        DistillKacError: its folder belongs to another spec.
    """
    record = ledger.get(point.name)
    if record is not None and record.status == "stopped":
        return False
    student = distill.resolve(point.spec)
    if point.after and not _has_student(student.init):
        return True
    plan = distill.check(student)
    if outputs.begin(student.out, student, CONFIG_FILE, **plan.content):
        claims.release(student.out)  # the process of the trial takes it
        return True
    was_cut_off = record is not None and record.status != "finished"
    if record is None or was_cut_off:
        record = record or TrialRecord(
            number=ledger.next_number(), name=point.name, out=student.out, values=point.values
        )
        ledger.put(record)
    metrics = _nest(student, plan, run, was_cut_off)
    updates = student.optimizer.updates
    ledger.change(
        point.name, status="finished", error="", updates=updates, metrics={**metrics, **ledger_metrics(ledger, point)}
    )
    return False


def ledger_metrics(ledger: Ledger, point: Point) -> dict[str, float]:
    """What a trial has reported last."""
    record = ledger.get(point.name)
    return {} if record is None else record.metrics


def _nest(
    student: DistillSpec, plan: distill.DistillPlan, run: tracking.TrackedRun, was_cut_off: bool
) -> dict[str, float]:
    """Show the run of a student that was complete before below the sweep's too; one without a run gets one.

    Args:
        was_cut_off: whether the sweep was stopped between the end of the student and that of its trial, whose run was
            then closed as one that was killed.

    Returns:
        What the training has reported last.
    """
    own = tracking.run_of_output(student.out)
    if own is None:
        with distill.start_run(student, plan, run) as made:
            made.tags({"distillkac.path": student.out})
        return {}
    own.nest(run)
    if was_cut_off:
        distill.end_cut_off(student)
    return {name: value for name, value in own.last_metrics().items() if name in checks.REPORTED}


def _close_stopped(ledger: Ledger) -> None:
    """A trial that was stopped early has ended as it should: its run says so."""
    for record in ledger.records:
        run = tracking.run_of_output(record.out) if record.status == "stopped" else None
        if run is not None:
            run.tags({"distillkac.stopped_early": f"after {record.updates} updates"})
            run.end("KILLED")


def _close_open(ledger: Ledger) -> None:
    """When a sweep is told to stop, its trials are killed and cannot say so: their runs are ended for them."""
    for record in ledger.records:
        # One that has not reported yet is waiting in the ledger, and may have a run all the same.
        run = tracking.run_of_output(record.out) if record.status in {"waiting", "running"} else None
        if run is not None:
            run.end("KILLED")


def _evaluate(spec: SweepSpec, ledger: Ledger, source: store.Store, run: tracking.TrackedRun) -> str | None:
    """Judge the finished students, in a run beside the sweep's; returns the folder, None if nothing is judged."""
    from pipeline.evaluate.stage import evaluate

    students = tuple(sorted(record.out for record in ledger.records if record.status == "finished"))
    if not spec.samples or not students:
        return None
    judged = _evaluation_spec(spec, source, students)
    out = judged.out
    _drop_other(out, judged)
    evaluate(judged)
    own = tracking.run_of_output(out)
    if own is not None:
        run.tags({"distillkac.evaluation": own.run_id})
    return out


def _evaluation_spec(spec: SweepSpec, source: store.Store, students: tuple[str, ...] = ()) -> EvaluateSpec:
    assert source.manifest is not None
    return EvaluateSpec(
        teacher=spec.teacher or source.manifest.teacher,
        students=students,
        out=files.join(spec.out, EVALUATION),
        samples=spec.samples,
        features=spec.features,
        label_selector=spec.label_selector,
    )


def _drop_other(out: str, judged: EvaluateSpec) -> None:
    """Remove an evaluation of another set of students, as one before more trials or retried ones; draws are cached."""
    try:
        options = json.loads(files.read_bytes(files.join(out, SPEC_FILE)))["options"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return
    wanted = judged.model_dump(mode="json")
    if any(options.get(name) != wanted[name] for name in ("students", "samples", "features")):
        files.remove_tree(out)


def _answer(
    spec: SweepSpec, ledger: Ledger, evaluation: str | None, run: tracking.TrackedRun, metric: str, better: str
) -> None:
    write_answer(spec, ledger.records, evaluation, run, metric, better)
    if spec.register:
        _register_best(spec, spec.register)


def _register_best(spec: SweepSpec, name: str) -> None:
    """Register the best student, under the alias ``best``."""
    from pipeline.tracking import logged_models

    best = json.loads(files.read_bytes(files.join(spec.out, ANSWER_FILE)))["best"]
    own = None if best is None else tracking.run_of_output(best["out"])
    if own is not None:
        version = logged_models.register(own, name, alias="best")
        log.info(f"sweep: registered {best['name']} as models:/{name}@best, version {version}")
