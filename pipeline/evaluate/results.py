"""Writes an evaluation's results to its folder, to its MLflow run, and to the evaluated models' runs."""

import io
import json
from collections.abc import Sequence

import numpy as np

from kac.metrics import QualityMetric
from kac.metrics.quality import at_floor_count
from kac.util import files
from pipeline import outputs, tracking
from pipeline.config import EvaluateSpec
from pipeline.evaluate.samples import Comparison, chunks
from pipeline.evaluate.scores import EVALUATION_FILE, Record, Score, cells, table
from pipeline.report import pictures

TABLE_FILE, TABLE_JSON = "table.txt", "table.json"
SAMPLES_PICTURE, CURVE_PICTURE = "samples.png", "quality_by_nfe.png"
SAMPLES_FILE = "samples.npz"
"""The samples in the picture. The keys are the row numbers of the table."""

SHOWN_SAMPLES = 12
"""Images per row of the picture."""

STAGES = {"student": ("distill",), "teacher": ("teach", "convert")}
"""The stages that produce each kind of model."""

HALF_WIDTH_TAG = "distillkac.half_width."
EVALUATION_TAG = "distillkac.evaluation"


def write_results(comparison: Comparison, run: tracking.TrackedRun, record: Record) -> None:
    """Write the files and log to MLflow. The last file, ``evaluation.json``, marks the folder as complete."""
    spec = comparison.spec
    tracking.declare(*record.metrics().values())
    images, labels = _shown(comparison)
    if max(labels) < comparison.candidates[0].config.num_classes:  # false for the null labels of an unconditional model
        record = record.model_copy(update={"shown_labels": labels})
    names = [score.name for score in record.scores]
    sink = io.BytesIO()
    np.savez_compressed(sink, **{str(number): rows for number, rows in enumerate(images)})  # type: ignore[arg-type]
    contents = {
        SAMPLES_PICTURE: pictures.comparison(list(zip(names, images, strict=True))),
        CURVE_PICTURE: pictures.quality_by_nfe(plotted(record), record.scores),
        TABLE_FILE: table(record).encode(),
    }
    for name, data in {**contents, SAMPLES_FILE: sink.getvalue()}.items():
        files.write_bytes(files.join(spec.out, name), data)
    # The file has the format of mlflow.log_table. The tag below makes MLflow's pages show it as a table.
    logged_table = dict(zip(("columns", "data"), cells(record), strict=True))
    for name, data in {**contents, TABLE_JSON: json.dumps(logged_table).encode()}.items():
        run.artifact(name, data)
    run.tags({"mlflow.loggedArtifacts": json.dumps([{"path": TABLE_JSON, "type": "table"}])})
    _track_models(spec, run, record, images, contents[CURVE_PICTURE])
    text = json.dumps(record.model_dump(mode="json"), indent=2).encode()
    run.artifact(EVALUATION_FILE, text)
    outputs.check_owner(spec.out, record.fingerprint)
    files.write_bytes(files.join(spec.out, EVALUATION_FILE), text)


def read_shown(out: str) -> list[np.ndarray] | None:
    """The samples in the picture, [shown, *sample] per row of the table; None if an older version wrote the folder."""
    path = files.join(out, SAMPLES_FILE)
    if not files.exists(path):
        return None
    with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as arrays:
        return [arrays[str(number)] for number in range(len(arrays.files))]


def _shown(comparison: Comparison) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """The first samples of each table row, and their labels. Real images have the same labels if possible."""
    sources = [comparison.source(candidate, comparison.seeds[0]) for candidate in comparison.candidates]
    samples = [source.rows(chunks(source)[0].ids) for source in sources]
    ids = chunks(comparison.held_out)[0].ids
    labels, unused = samples[0].label[:SHOWN_SAMPLES].tolist(), comparison.held_out.rows(ids).label.tolist()
    chosen = []
    for label in labels[: len(unused)]:
        index = unused.index(label) if label in unused else next(i for i, each in enumerate(unused) if each is not None)
        unused[index] = None
        chosen.append(index)
    floors = [source.rows(ids).images[chosen].numpy() for source in (comparison.held_out, comparison.decoded) if source]
    return [*floors, *(rows.images[:SHOWN_SAMPLES].numpy() for rows in samples)], tuple(labels)


def plotted(record: Record) -> list[QualityMetric]:
    """The metrics in the plot. Frechet distances depend on the sample count, so all rows use the real images' count."""
    metrics = record.metrics()
    shown = [metrics.get(at_floor_count(metric.name), metric) for metric in metrics.values() if metric.is_plotted]
    return [metric for metric in shown if all(metric.name in score.metrics for score in record.scores[1:])]


def _track_models(
    spec: EvaluateSpec, run: tracking.TrackedRun, record: Record, images: Sequence[np.ndarray], curve: bytes
) -> None:
    """Add metrics, pictures and the table to the run of each model.

    Real images get nested runs, and so does a model that has no run on the server where ``run`` is.
    """
    details = {"samples": str(record.samples), "seeds": " ".join(map(str, record.seeds)), "run": run.run_id}
    tags = {EVALUATION_TAG: record.fingerprint, **{f"{EVALUATION_TAG}.{name}": text for name, text in details.items()}}
    rows = list(zip(record.scores, images, strict=True))
    for folder in dict.fromkeys(score.folder for score in record.scores):
        own = [(score, shown) for score, shown in rows if score.folder == folder]
        # Of the runs that made the model, use the newest run on the evaluation's server.
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
        if score.steps is not None:
            nested.tags({"distillkac.steps": str(score.steps), "distillkac.guidance": f"{score.guidance:g}"})
        nested.artifact(SAMPLES_PICTURE, pictures.sheet(images, SHOWN_SAMPLES))
