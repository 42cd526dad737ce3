"""Adds the scores of an evaluation to the runs of the evaluated models: one MLflow run per model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kac.model import ModelConfig
from kac.sampling import TEACHER_STEPS, Sampling
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


class ScoredSamples(NamedTuple):
    """A row of the table with its first samples."""

    score: Score
    images: np.ndarray  # [shown, *sample], delivered


def metric_prefix(config: ModelConfig, sampling: Sampling, guidance: float) -> str:
    """The prefix of a row's metrics in its model's run; empty for the model's own step count and guidance scale."""
    is_teacher = config.kind == "teacher"
    steps, scale = (TEACHER_STEPS, 0.0) if is_teacher else (config.steps, config.guidance)
    parts = [f"steps_{sampling.steps}/"] if sampling.steps != steps else []
    parts += [f"guidance_{guidance:g}/"] if guidance != scale else []
    return "".join(parts)


def track_models(
    spec: EvaluateSpec, run: tracking.TrackedRun, record: Record, rows: Sequence[ScoredSamples], curve: bytes
) -> None:
    """Add metrics, pictures and the table to the run of each model.

    Real images, and models without a run on this server, get nested runs.

    Args:
        run: of the evaluation.
        rows: real images first.
        curve: plot of quality against cost.
    """
    for folder in dict.fromkeys(row.score.folder for row in rows):
        own_rows = [row for row in rows if row.score.folder == folder]
        model_run = _run_of(own_rows[0].score, run)
        if model_run is None:
            for row in own_rows:
                _start_nested_run(spec, run, row)
            continue
        _log(model_run, [row.score for row in own_rows])
        details = {"samples": str(record.samples), "seeds": " ".join(map(str, record.seeds)), "run": run.run_id}
        tags = {f"{EVALUATION_TAG}.{name}": value for name, value in details.items()}
        model_run.tags({EVALUATION_TAG: record.fingerprint, **tags})
        picture = pictures.comparison([(row.score.name, row.images) for row in (rows[0], *own_rows)])
        contents = {SAMPLES_PICTURE: picture, CURVE_PICTURE: curve, TABLE_FILE: table(record).encode()}
        for name, data in contents.items():
            model_run.artifact(f"evaluation-{record.fingerprint[:8]}/{name}", data)


def _run_of(score: Score, evaluation: tracking.TrackedRun) -> tracking.TrackedRun | None:
    """The newest run that produced the model, on the server of the evaluation."""
    for stage in STAGES.get(score.kind, ()):
        if runs := tracking.find_runs(score.fingerprint, stage, evaluation.tracking_uri):
            return runs[0]
    return None


def _log(run: tracking.TrackedRun, scores: Sequence[Score]) -> None:
    """Log metrics, and the half widths of their confidence intervals as tags."""
    run.metrics({score.prefix + name: value for score in scores for name, value in score.metrics.items()})
    widths = {score.prefix + name: value for score in scores for name, value in score.half_widths.items()}
    run.tags({f"{HALF_WIDTH_TAG}{name}": f"{value:.3g}" for name, value in widths.items()})


def _start_nested_run(spec: EvaluateSpec, run: tracking.TrackedRun, row: ScoredSamples) -> None:
    score = row.score
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
        nested.artifact(SAMPLES_PICTURE, pictures.sheet(row.images, SHOWN_SAMPLES))
