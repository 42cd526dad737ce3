"""Adds the scores of an evaluation to the runs of the evaluated models: one MLflow run per model."""

from collections.abc import Sequence

import numpy as np

from pipeline import tracking
from pipeline.config import EvaluateSpec
from pipeline.evaluate.scores import CURVE_PICTURE, REAL, SAMPLES_PICTURE, TABLE_FILE, Record, Score, table
from pipeline.report import pictures

SHOWN_SAMPLES = 12
"""Images per row of the picture."""

STAGES = {"student": ("distill",), "teacher": ("teach", "convert")}
"""The stages that produce each kind of model."""

HALF_WIDTH_TAG = "distillkac.half_width."
EVALUATION_TAG = "distillkac.evaluation"


def track_models(
    spec: EvaluateSpec, run: tracking.TrackedRun, record: Record, images: Sequence[np.ndarray], curve: bytes
) -> None:
    """Add metrics, pictures and the table to the run of each model.

    Real images, and models without a run on this server, get nested runs.

    Args:
        run: of the evaluation.
        images: the first delivered samples [shown, *sample] of each score.
        curve: plot of quality against cost.
    """
    details = {"samples": str(record.samples), "seeds": " ".join(map(str, record.seeds)), "run": run.run_id}
    tags = {EVALUATION_TAG: record.fingerprint, **{f"{EVALUATION_TAG}.{name}": text for name, text in details.items()}}
    rows = list(zip(record.scores, images, strict=True))
    for folder in dict.fromkeys(score.folder for score in record.scores):
        own = [(score, shown) for score, shown in rows if score.folder == folder]
        # The newest run that produced the model, on the server of the evaluation.
        stages = STAGES.get(own[0][0].kind, ())
        runs = [r for stage in stages for r in tracking.find_runs(own[0][0].fingerprint, stage, run.tracking_uri)]
        if not runs:
            for score, shown in own:
                _start_nested_run(spec, run, score, shown)
            continue
        _log(runs[0], [score for score, _ in own])
        runs[0].tags(tags)
        picture = pictures.comparison([(score.name, shown) for score, shown in (rows[0], *own)])
        contents = {SAMPLES_PICTURE: picture, CURVE_PICTURE: curve, TABLE_FILE: table(record).encode()}
        for name, data in contents.items():
            runs[0].artifact(f"evaluation-{record.fingerprint[:8]}/{name}", data)


def _log(run: tracking.TrackedRun, scores: Sequence[Score]) -> None:
    """Log metrics, and the half widths of their confidence intervals as tags."""
    run.metrics({score.prefix + name: value for score in scores for name, value in score.metrics.items()})
    widths = {score.prefix + name: value for score in scores for name, value in score.half_widths.items()}
    run.tags({f"{HALF_WIDTH_TAG}{name}": f"{value:.3g}" for name, value in widths.items()})


def _start_nested_run(spec: EvaluateSpec, run: tracking.TrackedRun, score: Score, images: np.ndarray) -> None:
    with tracking.start_run(
        stage="evaluate-model",
        name=score.name,
        spec=spec,
        fingerprint=score.fingerprint,
        inputs={score.kind: score.fingerprint},
        output=spec.out,
        parent=run,
    ) as nested:
        _log(nested, [score.model_copy(update={"prefix": ""})])
        if score.kind != REAL:
            nested.tags({"distillkac.steps": str(score.steps), "distillkac.guidance": f"{score.guidance:g}"})
        nested.artifact(SAMPLES_PICTURE, pictures.sheet(images, SHOWN_SAMPLES))
