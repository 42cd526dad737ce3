"""One run a model: an evaluation adds what it found to the runs of the models that it judged."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kac.model import ModelConfig
from kac.sampling import TEACHER_STEPS, Sampling
from pipeline import tracking
from pipeline.config.specs import EvaluateSpec
from pipeline.evaluate.scores import REAL, Record, Score, table
from pipeline.report import pictures

SAMPLES_PICTURE = "samples.png"
CURVE_PICTURE = "quality_by_nfe.png"
TABLE_FILE = "table.txt"
SHOWN = 12
"""Images a row of the picture."""

STAGES = {"student": ("distill",), "teacher": ("teach", "convert")}
"""The stages that make a model of a kind."""

HALF_WIDTH_TAG = "distillkac.half_width."
EVALUATION_TAG = "distillkac.evaluation"


class Shown(NamedTuple):
    """A row of the table, and the first of its samples."""

    score: Score
    images: np.ndarray  # [shown, *sample], delivered


def prefix_of(config: ModelConfig, sampling: Sampling, guidance: float) -> str:
    """What stands before the metrics of a row in its model's run; nothing for the model's own steps and scale."""
    is_teacher = config.kind == "teacher"
    steps, scale = (TEACHER_STEPS, 0.0) if is_teacher else (config.steps, config.guidance)
    parts = [f"steps_{sampling.steps}/"] if sampling.steps != steps else []
    parts += [f"guidance_{guidance:g}/"] if guidance != scale else []
    return "".join(parts)


def track_models(
    spec: EvaluateSpec, run: tracking.TrackedRun, record: Record, rows: Sequence[Shown], curve: bytes
) -> None:
    """Add metrics, pictures and table to the run of every model; a row whose model has none there gets a nested run.

    Args:
        run: the evaluation's own. curve: the picture of quality against cost.
    """
    real = rows[0]
    for folder in dict.fromkeys(row.score.folder for row in rows):
        own = [row for row in rows if row.score.folder == folder]
        of_model = _run_of(own[0].score, run)
        if of_model is None:
            for row in own:
                _track_apart(spec, run, row)
            continue
        below = f"evaluation-{record.fingerprint[:8]}"
        _log(of_model, [row.score for row in own])
        counted = {"samples": str(record.samples), "seeds": " ".join(map(str, record.seeds)), "run": run.run_id}
        of_model.tags(
            {EVALUATION_TAG: record.fingerprint, **{f"{EVALUATION_TAG}.{name}": v for name, v in counted.items()}}
        )
        picture = pictures.comparison([(row.score.name, row.images) for row in (real, *own)])
        of_model.artifact(f"{below}/{SAMPLES_PICTURE}", picture)
        of_model.artifact(f"{below}/{CURVE_PICTURE}", curve)
        of_model.artifact(f"{below}/{TABLE_FILE}", table(record).encode())


def _run_of(score: Score, evaluation: tracking.TrackedRun) -> tracking.TrackedRun | None:
    """The newest run that has made the model, on the evaluation's own server."""
    for stage in STAGES.get(score.kind, ()):
        if found := tracking.find_runs(score.fingerprint, stage, evaluation.tracking_uri):
            return found[0]
    return None


def _log(run: tracking.TrackedRun, scores: Sequence[Score]) -> None:
    """The metrics of some rows, and the half widths of their intervals as tags."""
    run.metrics({score.prefix + name: value for score in scores for name, value in score.metrics.items()})
    widths = {score.prefix + name: value for score in scores for name, value in score.half_widths.items()}
    run.tags({f"{HALF_WIDTH_TAG}{name}": f"{value:.3g}" for name, value in widths.items()})


def _track_apart(spec: EvaluateSpec, run: tracking.TrackedRun, row: Shown) -> None:
    """A nested run for real images, and for a model that was made elsewhere."""
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
        nested.artifact(SAMPLES_PICTURE, pictures.sheet(row.images, SHOWN))
