"""Quickstart: from nothing to a refined student of the handwritten digits on one machine, a table and a report."""

from collections.abc import Sequence

from kac.losses import FlowMapConfig
from kac.losses.refinement import DataRefinementConfig
from kac.util import files
from kac.util.log import log
from pipeline import tracking
from pipeline.cluster import connection as cluster
from pipeline.config.specs import DistillSpec, EvaluateSpec, OptimizerConfig, QuickstartSpec, RolloutSpec, TeachSpec
from pipeline.distill import distill
from pipeline.evaluate.scores import Score
from pipeline.evaluate.stage import evaluate
from pipeline.outputs import SPEC_FILE
from pipeline.report.run_report import mlflow_command, write_report
from pipeline.rollout import rollout
from pipeline.store.layout import MANIFEST
from pipeline.teach import teach

TEACHER = OptimizerConfig(updates=1400, batch_size=1024, learning_rate=8e-3)
"""In the time of teach's defaults, large batches bring the teacher's Frechet distances far further down: with 1,500
updates of them from 0.28 to 0.18 (pixels) and from 9.0 to 4.8 (classifier), 5,000 delivered samples, seed 0."""

OBJECTIVE = FlowMapConfig(loss="huber")
FLOW_MAP = OptimizerConfig(updates=850, batch_size=1024, learning_rate=6e-3, warmup_updates=50)
REFINEMENT = OptimizerConfig(updates=450, learning_rate=5e-4, warmup_updates=20)
"""Of 256 images an update, half of them of one step. With these the whole takes less than five minutes on two cores."""


def quickstart(spec: QuickstartSpec) -> None:
    """Teach, roll out, distill one student for all step counts, refine it, evaluate, report.

    Every stage goes on where an earlier run stopped.

    Raises:
        DistillKacError: as the stages.
    """
    out = cluster.absolute(spec.out)
    names = ("teacher", "store", "flow-map", "refined", "evaluation")
    teacher, store, flow_map, refined, evaluation = (files.join(out, name) for name in names)
    student = DistillSpec(store=store, out=flow_map, objective=OBJECTIVE, optimizer=FLOW_MAP, seed=spec.seed, workers=0)
    better = {"out": refined, "init": flow_map, "refine": DataRefinementConfig(), "optimizer": REFINEMENT}
    with tracking.start_run(spec=spec, fingerprint=spec.fingerprint(), inputs={}, output=out) as run:
        teach(TeachSpec(out=teacher, seed=spec.seed, optimizer=TEACHER, workers=0), run)
        rollout(RolloutSpec(teacher=teacher, store=store, seed=spec.seed, trajectories=spec.trajectories), run)
        distill(student, run)
        distill(student.model_copy(update=better), run)
        judged = EvaluateSpec(teacher=teacher, students=(flow_map, refined), out=evaluation, steps=spec.steps)
        scores = evaluate(judged, run)
    uri = tracking.tracking_uri(out)
    sections = {
        "teach": files.join(teacher, SPEC_FILE),
        "rollout": files.join(store, MANIFEST),
        "distill": files.join(flow_map, SPEC_FILE),
        "refine": files.join(refined, SPEC_FILE),
        "evaluate": files.join(evaluation, SPEC_FILE),
    }
    report = files.join(out, "report.html")
    write_report(report, "quickstart on the handwritten digits", evaluation, sections, uri)
    log.info(f"quickstart: {_headline(scores)}")
    log.info(f"quickstart: the report is {report}")
    log.info(f"quickstart: compare the runs with: {mlflow_command(uri)}")


def _headline(scores: Sequence[Score]) -> str:
    """What the refined student in its fewest steps is beside its teacher, by features that it was not trained on."""
    teacher = next(score for score in scores if score.kind == "teacher")
    student = min((score for score in scores if score.refined_in), key=lambda score: score.steps or 0)
    here, there = (f"{score.metrics['frechet_distance_classifier']:.3g}" for score in (student, teacher))
    steps = "1 step" if student.steps == 1 else f"{student.steps} steps"
    return f"Frechet distance {here} in {steps}, {there} of the teacher in {teacher.steps} (features of the classifier)"
