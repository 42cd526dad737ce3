"""Evaluate: the teacher and its students from the same noise, in one table, one picture and one curve."""

import json
from typing import Any, NamedTuple

from kac import files
from kac.checkpoint import CONFIG_FILE, ModelConfig, load_config, load_model, load_teacher_config
from kac.data import open_dataset
from kac.device import default_device
from kac.errors import DistillKacError
from kac.metrics import QUALITY, Judged, Reference
from kac.options import Options
from kac.sampling import Sampling, draw, student_sampling, teacher_sampling
from pipeline import cluster, outputs, pictures, tracking
from pipeline.config import EvaluateSpec

EVALUATION_FILE = "evaluation.json"
SAMPLES_PICTURE = "samples.png"
CURVE_PICTURE = "quality_by_nfe.png"
SHOWN = 12
"""Images a row of the picture."""


class Score(Options):
    """One row of the table."""

    name: str
    kind: str
    steps: int
    guidance: float
    metrics: dict[str, float]  # of ``QUALITY``, those that apply
    fingerprint: str


class Candidate(NamedTuple):
    """A model in the comparison, and how it is sampled."""

    name: str
    path: str
    config: ModelConfig
    guidance: float  # chosen for a teacher, built into a student
    sampling: Sampling


def evaluate(spec: EvaluateSpec, parent: tracking.TrackedRun | None = None) -> list[Score]:
    """Score every model, print the table and write ``evaluation.json`` and the pictures.

    Each student is compared with the teacher at the student's own guidance scale.

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
    candidates = _candidates(spec)
    content = {"models": {candidate.name: candidate.config.weights_sha256 for candidate in candidates}}
    if not outputs.begin(spec.out, spec, EVALUATION_FILE, **content):
        print(f"evaluate: {spec.out} is complete: nothing to do", flush=True)
        scores = read_scores(spec.out)
        print(table(scores), flush=True)
        return scores
    fingerprint = spec.fingerprint(**content)
    inputs = {f"{c.config.kind}.{c.name}": c.config.fingerprint for c in candidates}
    with tracking.start_run(spec=spec, fingerprint=fingerprint, inputs=inputs, output=spec.out, parent=parent) as run:
        judged = _judge(spec, candidates)
        scores = [_score(candidate, samples) for candidate, samples in zip(candidates, judged, strict=True)]
        _write(spec, run, fingerprint, judged, scores)
    print(table(scores), flush=True)
    print(f"evaluate: wrote {spec.out}", flush=True)
    return scores


def read_scores(out: str) -> list[Score]:
    """The scores in a finished evaluation's folder."""
    record = json.loads(files.read_bytes(files.join(out, EVALUATION_FILE)))
    return [Score(**score) for score in record["scores"]]


COLUMNS = [metric for metric in QUALITY.values() if metric.heading]
TABLE_HEAD = ["model", "steps", "w", *(metric.heading for metric in COLUMNS)]


def table_row(score: Score) -> list[str]:
    """The cells of a score under ``TABLE_HEAD``."""
    cells = [format(score.metrics[m.name], m.format) if m.name in score.metrics else "" for m in COLUMNS]
    return [score.name, str(score.steps), f"{score.guidance:g}", *cells]


def table(scores: list[Score]) -> str:
    """The scores as text, one line a model."""
    rows = [TABLE_HEAD, *(table_row(score) for score in scores)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])  # names left, numbers right
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _candidates(spec: EvaluateSpec) -> list[Candidate]:
    teacher = load_teacher_config(spec.teacher)
    students = [_student(spec, teacher, path) for given in spec.students for path in _student_folders(given)]
    students.sort(key=lambda student: (student.guidance, -student.sampling.steps, student.name))
    teachers = [
        Candidate(f"teacher w={w:g}", spec.teacher, teacher, w, teacher_sampling(w, spec.solver_steps, spec.solver))
        for w in sorted({0.0, *(student.guidance for student in students)})
    ]
    return [*teachers, *students]


def _student(spec: EvaluateSpec, teacher: ModelConfig, path: str) -> Candidate:
    config = load_config(path)
    if config.kind != "student":
        raise DistillKacError(f"{path}: expected a student, found a {config.kind}")
    if config.teacher_sha256 != teacher.weights_sha256:
        raise DistillKacError(
            f"{path}: expected a student of the teacher {teacher.weights_sha256[:12]}... in {spec.teacher}, "
            f"found one of {str(config.teacher_sha256)[:12]}...: give its own teacher"
        )
    assert config.guidance is not None
    return Candidate(path.rsplit("/", 1)[-1], path, config, config.guidance, student_sampling(config))


def _student_folders(path: str) -> list[str]:
    """A student's folder, or those below a sweep's."""
    if files.exists(files.join(path, CONFIG_FILE)):
        return [path]
    below = (name.split("/") for name in files.list_sizes(path))
    found = [files.join(path, parts[0]) for parts in below if parts[1:] == [CONFIG_FILE]]
    if not found:
        raise DistillKacError(f"{path}: expected a student's folder or a sweep's, found no {CONFIG_FILE} there")
    return found


def _judge(spec: EvaluateSpec, candidates: list[Candidate]) -> list[Judged]:
    """Samples of every candidate, those of the teachers first."""
    reference = Reference(open_dataset(candidates[0].config.data))
    teachers: dict[float, Judged] = {}
    judged = []
    for candidate in candidates:
        model = load_model(candidate.path, default_device())
        made = draw(model, candidate.sampling, spec.precision, spec.seed, spec.samples, spec.batch_size)
        speed, teacher = spec.samples / made.seconds, teachers.get(candidate.guidance)
        judged.append(Judged(made.images, made.label, made.nfe, speed, reference, teacher))
        teachers.setdefault(candidate.guidance, judged[-1])
    return judged


def _score(candidate: Candidate, samples: Judged) -> Score:
    scores = {name: samples.score(name) for name in QUALITY}
    return Score(
        name=candidate.name,
        kind=candidate.config.kind,
        steps=candidate.sampling.steps,
        guidance=candidate.guidance,
        metrics={name: value for name, value in scores.items() if value is not None},
        fingerprint=candidate.config.fingerprint,
    )


def _write(
    spec: EvaluateSpec, run: tracking.TrackedRun, fingerprint: str, judged: list[Judged], scores: list[Score]
) -> None:
    rows = [(score.name, made.images[:SHOWN].numpy()) for score, made in zip(scores, judged, strict=True)]
    panels = [
        (metric, [(s.kind, s.guidance, s.metrics["nfe"], s.metrics[metric.name]) for s in scores])
        for metric in QUALITY.values()
        if metric.is_plotted
    ]
    images = {
        SAMPLES_PICTURE: pictures.comparison(rows),
        CURVE_PICTURE: pictures.quality_by_nfe(panels),
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
    outputs.check_owner(spec.out, fingerprint)
    files.write_bytes(files.join(spec.out, EVALUATION_FILE), text)


def _track_model(spec: EvaluateSpec, run: tracking.TrackedRun, score: Score, picture: bytes) -> None:
    """A nested run a model, so that MLflow compares any two side by side."""
    with tracking.start_run(
        stage="evaluate-model",
        name=score.name,
        spec=spec,
        fingerprint=score.fingerprint,
        inputs={score.kind: score.fingerprint},
        output=spec.out,
        parent=run,
    ) as nested:
        nested.metrics(score.metrics)
        nested.tags({"distillkac.steps": str(score.steps), "distillkac.guidance": f"{score.guidance:g}"})
        nested.artifact(SAMPLES_PICTURE, picture)
