"""Quickstart: every stage on the handwritten digits, on one machine, ending in a table and a report."""

from kac import files
from pipeline import cluster, tracking
from pipeline.config import EvaluateSpec, OptimizerConfig, QuickstartSpec, RolloutSpec, SweepSpec, TeachSpec
from pipeline.evaluate import evaluate
from pipeline.outputs import SPEC_FILE
from pipeline.report import mlflow_command, write_report
from pipeline.rollout import rollout
from pipeline.store.layout import MANIFEST
from pipeline.sweep import sweep
from pipeline.teach import teach

TEACHER = OptimizerConfig(updates=1400, batch_size=1024, learning_rate=8e-3)
"""In the time of teach's defaults, large batches bring the teacher's Frechet distances far further down: with 1,500
updates of them from 0.28 to 0.18 (pixels) and from 9.0 to 4.8 (classifier), 5,000 delivered samples, seed 0."""

STUDENTS = OptimizerConfig(updates=1700, learning_rate=3e-3, warmup_updates=50)
"""A little less than the defaults: the whole takes less than five minutes on two cores."""


def quickstart(spec: QuickstartSpec) -> None:
    """Teach, roll out, sweep, evaluate, report; every stage goes on where an earlier run stopped.

    Raises:
        DistillKacError: as the stages.
    """
    out = cluster.absolute(spec.out)
    teacher, store, students, evaluation = (
        files.join(out, name) for name in ("teacher", "store", "students", "evaluation")
    )
    with tracking.start_run(spec=spec, fingerprint=spec.fingerprint(), inputs={}, output=out) as run:
        teach(TeachSpec(out=teacher, seed=spec.seed, optimizer=TEACHER, workers=0), run)
        rollout(RolloutSpec(teacher=teacher, store=store, seed=spec.seed, trajectories=spec.trajectories), run)
        trials = sweep(SweepSpec(store=store, out=students, steps=spec.steps, optimizer=STUDENTS, seed=spec.seed), run)
        paths = tuple(trial.spec.out for trial in trials)
        evaluate(EvaluateSpec(teacher=teacher, students=paths, out=evaluation), run)
    uri = tracking.tracking_uri(out)
    sections = {
        "teach": files.join(teacher, SPEC_FILE),
        "rollout": files.join(store, MANIFEST),
        **{f"distill {trial.name}": files.join(trial.spec.out, SPEC_FILE) for trial in trials},
        "evaluate": files.join(evaluation, SPEC_FILE),
    }
    report = files.join(out, "report.html")
    write_report(report, "quickstart on the handwritten digits", evaluation, sections, uri)
    print(f"quickstart: the report is {report}", flush=True)
    print(f"quickstart: compare the runs with: {mlflow_command(uri)}", flush=True)
