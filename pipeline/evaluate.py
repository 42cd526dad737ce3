"""Evaluate: the teacher and its students from the same noise, in one table, one picture and one curve."""

import json
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kac import files, metrics
from kac.checkpoint import CONFIG_FILE, Model, ModelConfig, load_config, load_model
from kac.data import Dataset, load_dataset
from kac.errors import DistillKacError
from kac.options import Options
from pipeline import cluster, outputs, pictures, tracking
from pipeline.config import EvaluateSpec
from pipeline.generate import How, generate, starts

EVALUATION_FILE = "evaluation.json"
SAMPLES_PICTURE = "samples.png"
CURVE_PICTURE = "frechet_by_nfe.png"
SHOWN = 12
"""Images a row of the picture."""


class Score(Options):
    """One row of the table."""

    name: str
    kind: str
    steps: int
    guidance: float
    nfe: int
    frechet_distance: float
    frechet_ratio: float | None
    label_agreement: float
    endpoint_error: float | None
    images_per_second: float
    fingerprint: str


class Entrant(NamedTuple):
    """A model in the comparison, and how it is sampled."""

    name: str
    path: str
    config: ModelConfig
    how: How


def evaluate(spec: EvaluateSpec, parent: tracking.TrackedRun | None = None) -> list[Score]:
    """Score every model, print the table and write ``evaluation.json`` and the pictures.

    Each student is held against the teacher at the student's own guidance scale.

    Raises:
        DistillKacError: a model is missing, or a student is of another teacher.
    """
    spec = spec.model_copy(
        update={
            "out": cluster.absolute(spec.out),
            "teacher": cluster.absolute(spec.teacher),
            "students": tuple(cluster.absolute(path) for path in spec.students),
        }
    )
    entrants = _entrants(spec)
    content = {"models": {entrant.name: entrant.config.weights_sha256 for entrant in entrants}}
    if outputs.claim(spec.out, spec, EVALUATION_FILE, **content):
        print(f"evaluate: {spec.out} is complete: nothing to do", flush=True)
        scores = [
            Score(**score) for score in json.loads(files.read_bytes(files.join(spec.out, EVALUATION_FILE)))["scores"]
        ]
        print(table(scores), flush=True)
        return scores
    name = spec.fingerprint(**content)
    inputs = {f"{e.config.kind}.{e.name}": e.config.fingerprint for e in entrants}
    with tracking.start_run("evaluate", "evaluate", spec, name, inputs, spec.out, parent) as run:
        data = load_dataset(entrants[0].config.data)
        samples = [_draw(spec, entrant) for entrant in entrants]
        scores = _score(entrants, samples, data)
        _write(spec, run, name, entrants, samples, scores)
    print(table(scores), flush=True)
    print(f"evaluate: wrote {spec.out}", flush=True)
    return scores


TABLE_HEAD = ("model", "steps", "w", "NFE", "Frechet", "ratio", "label agr.", "endpoint err.", "images/s")


def table_row(score: Score) -> list[str]:
    """The cells of a score under ``TABLE_HEAD``."""
    return [
        score.name,
        str(score.steps),
        f"{score.guidance:g}",
        str(score.nfe),
        f"{score.frechet_distance:.4f}",
        "" if score.frechet_ratio is None else f"{score.frechet_ratio:.3f}",
        f"{score.label_agreement:.4f}",
        "" if score.endpoint_error is None else f"{score.endpoint_error:.4f}",
        f"{score.images_per_second:,.0f}",
    ]


def table(scores: list[Score]) -> str:
    """The scores as text, one line a model."""
    rows = [list(TABLE_HEAD), *(table_row(score) for score in scores)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])  # names left, numbers right
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _entrants(spec: EvaluateSpec) -> list[Entrant]:
    teacher = load_config(spec.teacher)
    if teacher.kind != "teacher":
        raise DistillKacError(f"{spec.teacher}: expected a teacher, found a student: give the folder of its teacher")
    students = []
    for path in (path for given in spec.students for path in _student_folders(given)):
        config = load_config(path)
        if config.kind != "student":
            raise DistillKacError(f"{path}: expected a student, found a {config.kind}")
        if config.teacher_sha256 != teacher.weights_sha256:
            raise DistillKacError(
                f"{path}: expected a student of the teacher {teacher.weights_sha256[:12]}... in {spec.teacher}, "
                f"found one of {str(config.teacher_sha256)[:12]}...: give its own teacher"
            )
        assert config.steps is not None and config.guidance is not None
        name = path.rstrip("/").rsplit("/", 1)[-1]
        students.append(Entrant(name, path, config, How(config.guidance, config.steps, "euler")))
    students.sort(key=lambda entrant: (entrant.how.guidance, -entrant.how.steps, entrant.name))
    scales = sorted({0.0, *(student.how.guidance for student in students)})
    teachers = [
        Entrant(f"teacher w={w:g}", spec.teacher, teacher, How(w, spec.solver_steps, spec.solver)) for w in scales
    ]
    return [*teachers, *students]


def _student_folders(path: str) -> list[str]:
    """A student's folder, or those below a sweep's."""
    if files.exists(files.join(path, CONFIG_FILE)):
        return [path]
    location = files.locate(path)
    if location.fs.isdir(location.path):
        names = sorted(
            str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in location.fs.ls(location.path, detail=False)
        )
        found = [folder for name in names if files.exists(files.join(folder := files.join(path, name), CONFIG_FILE))]
        if found:
            return found
    raise DistillKacError(f"{path}: expected a student's folder or a sweep's, found no {CONFIG_FILE} there")


class Samples(NamedTuple):
    """What a model made."""

    images: Tensor  # [samples, *sample]
    label: Tensor  # [samples]
    nfe: int
    images_per_second: float


def _draw(spec: EvaluateSpec, entrant: Entrant) -> Samples:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Model = load_model(entrant.path, device)
    images, labels, nfe, seconds = [], [], 0, 0.0
    for first in range(0, spec.samples, spec.batch_size):
        noise, label = starts(model, spec.seed, range(first, min(first + spec.batch_size, spec.samples)))
        noise, given = noise.to(device), label.to(device)
        started = time.perf_counter()
        solution = generate(model, noise, given, entrant.how)
        images.append(solution.x.cpu())
        seconds += time.perf_counter() - started
        labels.append(label)
        nfe = solution.nfe
    made = torch.cat(images)
    if not torch.isfinite(made).all():
        raise DistillKacError(f"{entrant.path}: expected finite images, found NaN or infinity: the model has diverged")
    return Samples(made, torch.cat(labels), nfe, spec.samples / seconds)


def _score(entrants: list[Entrant], samples: list[Samples], data: Dataset) -> list[Score]:
    classifier = metrics.fit_classifier(data)
    distances = [metrics.frechet_distance(data.images, made.images) for made in samples]
    teachers = {e.how.guidance: i for i, e in enumerate(entrants) if e.config.kind == "teacher"}
    scores = []
    for entrant, made, distance in zip(entrants, samples, distances, strict=True):
        own = teachers[entrant.how.guidance]
        is_student = entrant.config.kind == "student"
        scores.append(
            Score(
                name=entrant.name,
                kind=entrant.config.kind,
                steps=entrant.how.steps,
                guidance=entrant.how.guidance,
                nfe=made.nfe,
                frechet_distance=distance,
                frechet_ratio=distance / distances[own] if is_student else None,
                label_agreement=metrics.label_agreement(classifier, made.images, made.label),
                endpoint_error=metrics.endpoint_error(made.images, samples[own].images) if is_student else None,
                images_per_second=made.images_per_second,
                fingerprint=entrant.config.fingerprint,
            )
        )
    return scores


def _write(
    spec: EvaluateSpec,
    run: tracking.TrackedRun,
    fingerprint: str,
    entrants: list[Entrant],
    samples: list[Samples],
    scores: list[Score],
) -> None:
    rows = [(entrant.name, made.images[:SHOWN].numpy()) for entrant, made in zip(entrants, samples, strict=True)]
    images = {
        SAMPLES_PICTURE: pictures.comparison(rows),
        CURVE_PICTURE: pictures.frechet_curve([(s.kind, s.nfe, s.frechet_distance, s.guidance) for s in scores]),
    }
    for name, data in images.items():
        files.write_bytes(files.join(spec.out, name), data)
        run.artifact(name, data)
    for score, (_, shown) in zip(scores, rows, strict=True):
        _track_model(spec, run, score, pictures.sheet(shown, SHOWN))
    record: dict[str, Any] = {
        "fingerprint": fingerprint,
        "samples": spec.samples,
        "scores": [score.model_dump(mode="json") for score in scores],
    }
    text = json.dumps(record, indent=2).encode()
    run.artifact(EVALUATION_FILE, text)
    files.write_bytes(files.join(spec.out, EVALUATION_FILE), text)


def _track_model(spec: EvaluateSpec, run: tracking.TrackedRun, score: Score, picture: bytes) -> None:
    """A nested run a model, so that MLflow compares any two side by side."""
    inputs = {score.kind: score.fingerprint}
    with tracking.start_run("evaluate-model", score.name, spec, score.fingerprint, inputs, spec.out, run) as nested:
        logged = score.model_dump(include=set(tracking.METRICS))
        nested.metrics({name: value for name, value in logged.items() if value is not None})
        nested.tags({"distillkac.steps": str(score.steps), "distillkac.guidance": f"{score.guidance:g}"})
        nested.artifact(SAMPLES_PICTURE, picture)
