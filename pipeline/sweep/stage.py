"""The stage: check everything, add what the store lacks, run the trials, judge the students, answer."""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kac import files
from kac.checkpoint import CONFIG_FILE
from kac.errors import DistillKacError, one_line
from kac.metrics import quality_metrics
from kac.options import OptionError
from pipeline import cluster, distill, outputs, store, tracking
from pipeline.config import DistillSpec, EvaluateSpec, RolloutRecipe, RolloutSpec, SweepSpec
from pipeline.evaluation.inputs import ANSWER_FILE
from pipeline.outputs import SPEC_FILE
from pipeline.store import sharing
from pipeline.store.order import rows_of
from pipeline.sweep import space
from pipeline.sweep.answer import write_answer
from pipeline.sweep.ledger import Ledger, TrialRecord
from pipeline.sweep.space import Point

RESULT_FILE = "trials.json"
EVALUATION = "evaluation"
AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")

REPORTED = ("validation/energy_distance", "validation/endpoint_error", "loss")
"""What a trial reports while it trains; of all of them lower is better."""

PROCESS_FAILURES = 2
"""So many times a trial whose process died is started again within a sweep; it goes on from its checkpoint."""


def sweep(spec: SweepSpec, parent: tracking.TrackedRun | None = None) -> list[TrialRecord]:
    """Distill every student of the sweep, judge them and write the answer.

    What is finished stays as it is, what is not goes on, with the values that it had.

    Returns:
        A record a trial.

    Raises:
        DistillKacError: the options, the store, the cluster or the folder do not fit (before any trial starts), or
            trials failed (after all others have ended).
    """
    spec = _absolute(spec)
    points = [] if spec.search else space.grid_points(spec)
    metric, better = judged_by(spec)
    _check_early_stopping(spec)
    _check_validated(spec)
    source, missing = _check_store(spec, points or space.sample_points(spec))
    spec = spec.settled(lambda: _gpus_a_trial(spec, cluster.connect()) > 0)
    assert source.manifest is not None
    content = {"store": source.manifest.fingerprint, **space.identity(spec)}
    was_done = not outputs.begin(spec.out, spec, RESULT_FILE, **content)
    ledger = Ledger(spec.out)
    points = points or [space.make_point(spec, _varied(record), record.name) for record in ledger.records]
    total = max(len(points), spec.trials) if spec.search else len(points)
    if was_done and _is_complete(ledger, points, total):
        print(f"sweep: all {total} students in {spec.out} are complete: nothing to do", flush=True)
        return ledger.records
    _check_resources(spec)
    inputs = {"rollout": content["store"]}
    fingerprint = spec.fingerprint(**content)
    with tracking.start_run(spec=spec, fingerprint=fingerprint, inputs=inputs, output=spec.out, parent=parent) as run:
        if missing:
            _add_scales(spec, source, missing, run)
        todo = [point for point in points if _is_open(ledger, point, run)]
        complete = len(points) - len(todo)
        if todo or len(points) < total:
            _run_trials(spec, ledger, todo, total, run)
        _close_stopped(ledger)
        _check_reported(spec, ledger)
        evaluation = _evaluate(spec, ledger, source, run)
        _answer(spec, ledger, evaluation, run, metric, better)
    failed = [record for record in ledger.records if record.status == "failed"]
    if failed:
        raise DistillKacError(
            f"{spec.out}: {len(failed)} of {total} trials failed: "
            f"{'; '.join(f'{record.name}: {record.error}' for record in failed)}: "
            "run the same command again to go on with them"
        )
    listing = {"fingerprint": fingerprint, "students": [record.name for record in ledger.records]}
    files.write_bytes(files.join(spec.out, RESULT_FILE), json.dumps(listing, indent=2).encode())
    print(f"sweep: wrote {total - complete} students to {spec.out} ({complete} were complete)", flush=True)
    return ledger.records


def judged_by(spec: SweepSpec) -> tuple[str, str]:
    """The metric that says which student is best, and whether lower or higher is better.

    Raises:
        OptionError: nothing reports it.
    """
    known = dict.fromkeys(REPORTED, "lower")
    default = REPORTED[0]
    if spec.samples:
        made = {metric.name: metric.better for metric in quality_metrics(spec.features).values() if metric.better}
        known, default = {**known, **made}, f"frechet_distance_{spec.features[-1]}"
        default = default if default in known else next(iter(made))
    metric = spec.metric or default
    for option, name, allowed in (("--metric", metric, known), ("--asha-metric", spec.asha_metric, REPORTED)):
        if name not in allowed:
            without = "" if spec.samples else ", since --samples 0 leaves the students unevaluated"
            raise OptionError(
                f"{option}: expected a metric that is reported ({', '.join(allowed)}){without}, found {name}"
            )
    return metric, known[metric]


def _absolute(spec: SweepSpec) -> SweepSpec:
    paths = {name: getattr(spec, name) for name in ("out", "store", "teacher", "init")}
    return spec.model_copy(
        update={
            name: cluster.absolute(path)
            for name, path in paths.items()
            if path is not None and not (name == "init" and path == "teacher")
        }
    )


def _check_early_stopping(spec: SweepSpec) -> None:
    if bool(spec.search) != bool(spec.trials):
        has, lacks = ("--search", "--trials") if spec.search else ("--trials", "--search")
        raise OptionError(f"{lacks}: expected it beside {has}, found none")
    if spec.asha and spec.workers:
        raise OptionError("--asha: expected trials that train in their own process, found --workers: leave one out")
    if spec.chain and (spec.asha or spec.search or spec.objective.kind == "flow-map"):
        raise OptionError("--chain: expected a grid of students of one step count each, without --asha and --search")


def _check_store(spec: SweepSpec, points: Sequence[Point]) -> tuple[store.Store, list[float]]:
    """The store, and the guidance scales that it lacks; all that can be checked without them is.

    Raises:
        DistillKacError: something does not fit, or scales are missing and ``--rollout`` is not given.
    """
    source = store.open(spec.store)
    if spec.asha and any(point.spec.optimizer.updates <= spec.grace_updates for point in points):
        raise OptionError(f"--grace-updates: expected less than all updates of a trial, found {spec.grace_updates}")
    wanted = dict.fromkeys(point.spec.guidance for point in points)
    missing = [w for w in wanted if w != "all" and w not in source.guidance]
    assert source.manifest is not None
    if missing and not spec.rollout:
        raise OptionError(
            f"--guidance: expected scales of the store {spec.store} ({', '.join(f'{w:g}' for w in source.guidance)}), "
            f"found {', '.join(f'{w:g}' for w in missing)} missing: add --rollout to have them added first"
        )
    if spec.search and any(isinstance(draw, space.Uniform) for draw in _drawn(spec, "guidance")):
        raise OptionError("--search guidance: expected choice(...) of scales, found a range: a store has some of them")
    checked: set[tuple[Any, ...]] = set()
    for point in points:
        # A chain's student starts from one that is not there yet; it is checked again when it starts.
        init = spec.init if point.after else point.spec.init
        student = distill.resolve(point.spec.model_copy(update={"init": init}))
        key = (student.objective, student.steps, student.guidance, student.refine, student.init)
        if student.guidance not in missing and key not in checked:
            checked.add(key)
            distill.check(student)
    return source, missing


def _drawn(spec: SweepSpec, field: str) -> list[space.Draw]:
    return [draw for name, draw in space.draws_of(spec).items() if name == field]


def _add_scales(spec: SweepSpec, source: store.Store, missing: Sequence[float], run: tracking.TrackedRun) -> None:
    """Add guidance scales to the store by its own recipe, with the trajectories that it has of the others."""
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
                **recipe,
            ),
            run,
        )


def _check_resources(spec: SweepSpec) -> None:
    """Refuse trials that no node can ever run.

    Raises:
        OptionError: it says what was asked, and what there is.
    """
    import ray

    resources = cluster.connect()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (max((node.get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU"))
    if spec.workers:
        has, what = (resources.gpus, "GPUs") if resources.gpus else (resources.cpus, "CPUs")
        if spec.workers > has:
            raise OptionError(f"--workers: expected at most the {has} {what} of the cluster, found {spec.workers}")
        return
    for option, asked, has in (
        ("--cpus-per-trial", spec.cpus_per_trial, cpus),
        ("--gpus-per-trial", _gpus_a_trial(spec, resources), gpus),
    ):
        if asked > has:
            raise OptionError(f"{option}: expected at most the {has:g} of the largest node, found {asked:g}")


def _gpus_a_trial(spec: SweepSpec, resources: cluster.Resources) -> float:
    return spec.gpus_per_trial if spec.gpus_per_trial is not None else min(1, resources.gpus)


def _is_complete(ledger: Ledger, points: Sequence[Point], total: int) -> bool:
    """Whether every trial has ended and its student, if it is to have one, is there."""
    records = [ledger.get(point.name) for point in points]
    return len(points) == total and all(
        record is not None and (record.status == "stopped" or (not record.is_open and _has_student(record.out)))
        for record in records
    )


def _has_student(out: str) -> bool:
    return files.exists(files.join(out, CONFIG_FILE))


def _varied(record: TrialRecord) -> dict[str, Any]:
    return {name: value for name, value in record.values.items() if name != "chain"}


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
        return True
    if record is None or record.status != "finished":
        record = record or TrialRecord(
            number=ledger.next_number(), name=point.name, out=student.out, values=point.values
        )
        ledger.put(record)
    metrics = _nest(student, plan, run)
    updates = student.optimizer.updates
    ledger.change(
        point.name, status="finished", error="", updates=updates, metrics={**metrics, **ledger_metrics(ledger, point)}
    )
    return False


def ledger_metrics(ledger: Ledger, point: Point) -> dict[str, float]:
    """What a trial has reported last."""
    record = ledger.get(point.name)
    return {} if record is None else record.metrics


def _nest(student: DistillSpec, plan: distill.DistillPlan, run: tracking.TrackedRun) -> dict[str, float]:
    """Show the run of a student that was complete before below the sweep's too; one without a run gets one.

    Returns:
        What the training has reported last.
    """
    own = tracking.run_of_output(student.out)
    if own is None:
        inputs = {"rollout": plan.content["store"], "teacher": str(plan.student.teacher_sha256)}
        with tracking.start_run(
            spec=student,
            fingerprint=plan.student.fingerprint,
            inputs=inputs,
            output=student.out,
            parent=run,
            name=f"distill-steps-{student.steps}-guidance-{student.guidance}",
        ) as made:
            made.tags({"distillkac.path": student.out})
        return {}
    own.nest(run)
    return {name: value for name, value in own.last_metrics().items() if name in REPORTED}


def _close_stopped(ledger: Ledger) -> None:
    """A trial that was stopped early has ended as it should: its run says so."""
    for record in ledger.records:
        run = tracking.run_of_output(record.out) if record.status == "stopped" else None
        if run is not None:
            run.tags({"distillkac.stopped_early": f"after {record.updates} updates"})
            run.end("KILLED")


def _check_reported(spec: SweepSpec, ledger: Ledger) -> None:
    needs = "--asha" if spec.asha else "--searcher optuna" if spec.search and spec.searcher == "optuna" else ""
    ended = [record for record in ledger.records if record.status in {"finished", "stopped"}]
    if needs and ended and not any(spec.asha_metric in record.metrics for record in ended):
        raise DistillKacError(
            f"{spec.out}: expected {spec.asha_metric} from the trials for {needs}, found that none has reported it: "
            "choose another --asha-metric"
        )


def _run_trials(spec: SweepSpec, ledger: Ledger, todo: Sequence[Point], total: int, run: tracking.TrackedRun) -> None:
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner

    from pipeline.sweep.search import Halving, LedgerSearch

    # Tune's tables would bury the trials' progress; verbose=0 silences only its older reporter.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    resources = cluster.connect()
    # A trial that starts Ray Train workers reserves next to nothing itself, or it would wait for what it holds.
    needs = {"CPU": 0.01} if spec.workers else {"CPU": spec.cpus_per_trial, "GPU": _gpus_a_trial(spec, resources)}
    side_by_side = max(1, (resources.gpus or resources.cpus) // spec.workers) if spec.workers else None
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

    None where they do not fit ``--memory-gib`` or Ray's object store: there every trial reads for itself.
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
        report_to_tune(last, started, error=one_line(error) or type(error).__name__)
        return
    last["update"] = float(spec.optimizer.updates)
    report_to_tune(last, started, is_done=True)


def _evaluate(spec: SweepSpec, ledger: Ledger, source: store.Store, run: tracking.TrackedRun) -> str | None:
    """Judge the finished students; returns the folder, None if nothing is judged."""
    from pipeline.evaluate import evaluate

    students = tuple(sorted(record.out for record in ledger.records if record.status == "finished"))
    if not spec.samples or not students:
        return None
    assert source.manifest is not None
    out = files.join(spec.out, EVALUATION)
    judged = EvaluateSpec(
        teacher=spec.teacher or source.manifest.teacher,
        students=students,
        out=out,
        samples=spec.samples,
        features=spec.features,
    )
    _drop_other(out, judged)
    evaluate(judged, run)
    return out


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
    from pipeline import logged_models

    best = json.loads(files.read_bytes(files.join(spec.out, ANSWER_FILE)))["best"]
    own = None if best is None else tracking.run_of_output(best["out"])
    if own is not None:
        version = logged_models.register(own, name, alias="best")
        print(f"sweep: registered {best['name']} as models:/{name}@best, version {version}", flush=True)


def _check_validated(spec: SweepSpec) -> None:
    """Refuse to go by a validation that is not made."""
    needs = "--asha" if spec.asha else "--searcher optuna" if spec.search and spec.searcher == "optuna" else ""
    if not needs:
        return
    if spec.asha_metric.startswith("validation/") and spec.validation_updates == 0:
        raise OptionError(f"--validation-updates: expected some for {needs} on {spec.asha_metric}, found 0")
    if spec.asha_metric.endswith("endpoint_error") and not spec.held_out_rows:
        raise OptionError(f"--held-out-rows: expected some for {needs} on {spec.asha_metric}, found none")
