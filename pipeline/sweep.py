"""Sweep: a student for every point of a grid over one store, as trials of Ray Tune."""

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kac import files
from kac.checkpoint import CONFIG_FILE
from kac.errors import DistillKacError
from kac.fingerprint import fingerprint
from kac.options import OptionError
from pipeline import cluster, distill, outputs, tracking
from pipeline.config import DistillSpec, StudentOptions, SweepSpec

SWEEP_FILE = "sweep.json"
AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")


@dataclass(frozen=True)
class Trial:
    """One point of the grid."""

    name: str
    spec: DistillSpec


def sweep(spec: SweepSpec, parent: tracking.TrackedRun | None = None) -> list[Trial]:
    """Distill every student of the grid; finished ones are left as they are, unfinished ones go on.

    Raises:
        DistillKacError: a point of the grid does not fit the store (before any trial starts), or trials failed.
    """
    out = cluster.absolute(spec.out)
    spec = spec.settled(lambda: _gpus_a_trial(spec, cluster.connect()) > 0).model_copy(update={"out": out})
    trials = plan_trials(spec)
    plans = [distill.check(trial.spec) for trial in trials]
    open_trials = [
        trial
        for trial, plan in zip(trials, plans, strict=True)
        if outputs.begin(trial.spec.out, trial.spec, CONFIG_FILE, **plan.content)
    ]
    if not open_trials:
        print(f"sweep: all {len(trials)} students in {out} are complete: nothing to do", flush=True)
        return trials
    made = fingerprint({trial.name: plan.student.fingerprint for trial, plan in zip(trials, plans, strict=True)})
    inputs = {"rollout": plans[0].content["store"]}
    with tracking.start_run(spec=spec, fingerprint=made, inputs=inputs, output=out, parent=parent) as run:
        _run_trials(spec, open_trials, run)
    listing = {"fingerprint": made, "students": [trial.name for trial in trials]}
    files.write_bytes(files.join(out, SWEEP_FILE), json.dumps(listing, indent=2).encode())
    complete = len(trials) - len(open_trials)
    print(f"sweep: wrote {len(open_trials)} students to {out} ({complete} were complete)", flush=True)
    return trials


def plan_trials(spec: SweepSpec) -> list[Trial]:
    """The grid's points, each with the folder of its student.

    Raises:
        OptionError: an axis of ``--grid`` that is no field of a student's spec.
    """
    axes = [_parse_axis(text) for text in spec.grid]
    shared = {name: getattr(spec, name) for name in StudentOptions.model_fields}
    trials = []
    is_any_step = spec.objective.kind == "flow-map"
    counts = spec.steps[:1] if is_any_step else spec.steps
    for w, steps, *values in itertools.product(spec.guidance, counts, *(values for _, values in axes)):
        name = f"{'any-steps' if is_any_step else f'steps-{steps}'}-guidance-{w}"
        options = {**shared, "guidance": w, "steps": steps, "workers": spec.workers or 0}
        for (field, _), value in zip(axes, values, strict=True):
            name += f"-{field.replace('.', '-').replace('_', '-')}-{value}"
            options = _with(options, field.split("."), value)
        out = files.join(spec.out, name)
        trials.append(Trial(name, distill.resolve(DistillSpec(out=out, **options))))
    return trials


def _parse_axis(text: str) -> tuple[str, list[Any]]:
    field, equals, values = text.partition("=")
    field = field.strip().lstrip("-").replace("-", "_")
    top = field.split(".")[0]
    allowed = sorted(set(DistillSpec.model_fields) - {"store", "out", "teacher", "guidance", "steps", "workers"})
    if field == "objective.kind":
        raise OptionError("--grid objective.kind: expected one objective a sweep, --objective KIND: sweep each apart")
    if not equals or not values or top not in allowed:
        raise OptionError(f"--grid: expected FIELD=VALUE,VALUE with a field of {allowed}, found {text!r}")
    return field, [value.strip() for value in values.split(",")]


def _with(options: dict[str, Any], field: list[str], value: str) -> dict[str, Any]:
    head, *rest = field
    if not rest:
        return {**options, head: value}
    nested = options[head]
    values = nested.model_dump() if hasattr(nested, "model_dump") else nested
    return {**options, head: _with(values, rest, value)}


def _run_trials(spec: SweepSpec, trials: list[Trial], run: tracking.TrackedRun) -> None:
    from ray import tune
    from ray.tune import RunConfig, TuneConfig, Tuner

    # Tune's tables would bury the trials' progress bars; verbose=0 silences only its older reporter.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    resources = cluster.connect()
    gpus = _gpus_a_trial(spec, resources)
    # A trial that starts Ray Train workers reserves next to nothing itself, or it would wait for what it holds.
    needs = {"CPU": 0.01} if spec.workers else {"CPU": spec.cpus_per_trial, "GPU": gpus}
    side_by_side = max(1, (resources.gpus or resources.cpus) // spec.workers) if spec.workers else None
    # Tune's own records are scratch: what a trial needs to go on lies in its student's folder.
    with tempfile.TemporaryDirectory(prefix="distillkac-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = Tuner(
            tune.with_resources(tune.with_parameters(_trial, trials=trials, run=run), needs),
            param_space={"trial": tune.grid_search([trial.name for trial in trials])},
            tune_config=TuneConfig(max_concurrent_trials=side_by_side),
            run_config=RunConfig(name="tune", storage_path=scratch, verbose=0),
        )
        with _keys_out_of_sight():
            results = list(tuner.fit())
    failures = [f"{result.config['trial']}: {cluster.innermost(result.error)}" for result in results if result.error]
    if failures:
        raise DistillKacError(
            f"{spec.out}: {len(failures)} of {len(trials)} trials failed: {'; '.join(failures)}: "
            "run the same command again to go on with them"
        )


def _gpus_a_trial(spec: SweepSpec, resources: cluster.Resources) -> float:
    return spec.gpus_per_trial if spec.gpus_per_trial is not None else min(1, resources.gpus)


@contextmanager
def _keys_out_of_sight() -> Iterator[None]:
    """Without AWS keys in this process's environment: Ray Tune copies them into the runtime environment of its trials
    (tune/execution/class_cache.py), and Ray's agent writes that into its log. Trials have them from their node."""
    hidden = {name: os.environ.pop(name) for name in AWS_KEYS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _trial(config: dict[str, Any], trials: list[Trial], run: tracking.TrackedRun) -> None:
    """One trial, in its own process: the training loop runs right here, or on Ray Train workers of its own."""
    from ray import tune

    spec = next(trial.spec for trial in trials if trial.name == config["trial"])
    distill.distill(spec, run, on_report=tune.report)
