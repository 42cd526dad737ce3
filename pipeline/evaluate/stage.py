"""The stage: score held-out images, and the teacher and its students from the same noise."""

import io
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kac.data import open_dataset
from kac.guidance import check_guidance
from kac.metrics import Evaluated, quality_metrics
from kac.metrics.features import TORCHSCRIPT, FeatureSpace, open_space, space_identity
from kac.metrics.quality import PIXELS, at_floor_count
from kac.metrics.statistics import KEPT_ROWS
from kac.model import CONFIG_FILE, ModelConfig, learned_data, load_config, load_teacher_config
from kac.sampling import Sampling, student_sampling, teacher_sampling
from kac.util import files
from kac.util.errors import ArgumentError, DistillKacError
from kac.util.log import log
from kac.util.path_options import check_apart
from pipeline import outputs, tracking
from pipeline.cluster import storage
from pipeline.cluster.placement import choose_actors, wait_for_capacity
from pipeline.config import EvaluateSpec
from pipeline.evaluate.actors import make_chunks, open_spaces
from pipeline.evaluate.feature_trial import try_features
from pipeline.evaluate.gather import gather, real_images, reference_of, unfinished_reference, with_pixels
from pipeline.evaluate.inputs import resolve
from pipeline.evaluate.model_runs import SHOWN_SAMPLES, ScoredSamples, metric_prefix, track_models
from pipeline.evaluate.scores import (
    CURVE_PICTURE,
    EVALUATION_FILE,
    REAL,
    SAMPLES_PICTURE,
    TABLE_FILE,
    Record,
    Score,
    head,
    mean_score,
    read_record,
    row,
    table,
)
from pipeline.evaluate.sources import CHUNK_ROWS, ModelSamples, RealImages, chunks, unfinished
from pipeline.report import pictures

SAMPLES_FILE = "samples.npz"
"""The shown samples of each row of the table; the keys are row numbers."""

TABLE_JSON = "table.json"

REAL_FACTS = {"train", "held_out", "sha256", "split", "class_names"}
"""Fields of the data's description that a record contains."""

tracking.declare(*quality_metrics(EvaluateSpec.model_fields["features"].default).values())


class Candidate(NamedTuple):
    """A model in the comparison, with its sampling."""

    name: str
    path: str
    config: ModelConfig
    guidance: float  # chosen for a teacher, built into a student
    sampling: Sampling


class Comparison(NamedTuple):
    """The models and the real images of an evaluation, and the feature spaces that compare them."""

    spec: EvaluateSpec
    candidates: list[Candidate]
    spaces: list[FeatureSpace]
    train: RealImages
    held_out: RealImages

    def source(self, candidate: Candidate, seed: int) -> ModelSamples:
        """The samples of a candidate from one noise seed."""
        _, path, config, _, sampling = candidate
        return ModelSamples(path, config, sampling, self.spec.precision, seed, self.spec.samples, self.spec.batch_size)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The noise seeds."""
        return tuple(range(self.spec.seed, self.spec.seed + self.spec.seeds))


def evaluate(spec: EvaluateSpec, parent: tracking.TrackedRun | None = None) -> list[Score]:
    """Score held-out images and every model, print the table, and write ``evaluation.json`` and the pictures.

    Each student is compared with the teacher at the student's guidance scale. The scores of a model are added to the
    run that produced the model; the evaluation's run has the comparison. Samples stay in the cache, so a stopped
    evaluation resumes, and the next evaluation with the same teacher draws only its students.

    Raises:
        DistillKacError: a model is missing, a student has another teacher, the data are not the teacher's, or a
            feature space is missing or does not work on the data.
    """
    spec = resolve(spec)
    assert spec.teacher is not None  # resolve found it
    root = load_teacher_config(spec.teacher).data.root
    check_apart(spec, {"`data.root` of the teacher": root})
    _check_storage(spec, root)
    spec = spec.settled(lambda: choose_actors(spec).on_gpu)
    candidates = _candidates(spec)
    content = _content(spec, candidates)
    if not files.exists(files.join(spec.out, EVALUATION_FILE)):
        try_features(spec, candidates[0].config.data)
    if not outputs.begin(spec.out, spec, EVALUATION_FILE, **content):
        log.info(f"evaluate: {spec.out} is complete: nothing to do")
        record = read_record(spec.out)
        log.info(table(record))
        return list(record.scores)
    if spec.actors or (spec.actors is None and (spec.gpu or spec.label_selector)):
        # For one actor; the number that the work needs is not known yet.
        wait_for_capacity("evaluate", "`actors`", 1, choose_actors(spec).resources)
    fingerprint = spec.fingerprint(**content)
    inputs = {f"{c.config.kind}.{c.name}": c.config.fingerprint for c in candidates}
    data = candidates[0].config.data
    datasets = [tracking.Dataset(data.kind, candidates[0].config.data_sha256, data.origin, "evaluation")]
    with tracking.start_run(
        spec=spec, fingerprint=fingerprint, inputs=inputs, output=spec.out, parent=parent, datasets=datasets
    ) as run:
        comparison = _draw(spec, candidates)
        record = _score_all(comparison, fingerprint)
        _write(comparison, run, record)
    log.info(table(record))
    return list(record.scores)


def _check_storage(spec: EvaluateSpec, root: str | None) -> None:
    """Refuse paths that not all machines share; ``root``: of the teacher's data."""
    uses_actors = spec.actors != 0
    feature_files = [given for given in spec.features if given.endswith(TORCHSCRIPT)]
    storage.check_shared(
        {
            "`out`": spec.out,
            "`teacher`": spec.teacher,
            "`students`": spec.students,
            "`features`": feature_files,
            **storage.cache_of(),
        },
        lambda: uses_actors,
    )
    storage.check_shared({"`data.root` of the teacher": root}, lambda: uses_actors)


def _content(spec: EvaluateSpec, candidates: list[Candidate]) -> dict[str, Any]:
    """The inputs in the fingerprint of an evaluation: the weights of the models, and hashes of feature files."""
    data = learned_data(candidates[0].path, candidates[0].config)
    identities = [space_identity(given, data) for given in spec.features]
    hashes = {identity["space"]: identity["sha256"] for identity in identities if "sha256" in identity}
    models = {candidate.name: candidate.config.weights_sha256 for candidate in candidates}
    return {"models": models, "images": "delivered", **({"feature_files": hashes} if hashes else {})}


def read_scores(out: str) -> list[Score]:
    """The scores in an evaluation's folder; raises as ``read_record``."""
    return list(read_record(out).scores)


def _candidates(spec: EvaluateSpec) -> list[Candidate]:
    """Every model with its sampling: teachers first, then students, sorted by guidance."""
    assert spec.teacher is not None  # resolve found it
    teacher = load_teacher_config(spec.teacher)
    check_guidance(teacher, spec.guidance)
    folders = [path for given in spec.students for path in student_folders(given)]
    names = _names(list(dict.fromkeys(folders)))
    students = [student for path, name in names.items() for student in _students(spec, teacher, path, name)]
    if spec.guidance and not any(student.config.takes_guidance for student in students):
        raise ArgumentError(
            "`guidance` has no effect, because no student takes a guidance scale as an input. Leave it out, or distill "
            "a student with `guidance` all."
        )
    students.sort(key=lambda student: (student.guidance, -student.sampling.steps, student.name))
    teachers = [
        Candidate(
            f"teacher w={w:g}", spec.teacher, teacher, w, teacher_sampling(teacher, w, spec.solver_steps, spec.solver)
        )
        for w in sorted({0.0, *(student.guidance for student in students)})
    ]
    return [*teachers, *students]


def _names(folders: Sequence[str]) -> dict[str, str]:
    """Unique names of students by folder: the last part of the path, with as many parts before it as needed."""
    names = {path: path.rsplit("/", 1)[-1] for path in folders}
    for depth in itertools.count(2):
        counts = Counter(names.values())
        if max(counts.values(), default=1) == 1:
            break
        names |= {path: "/".join(path.split("/")[-depth:]) for path, name in names.items() if counts[name] > 1}
    return names


def _students(spec: EvaluateSpec, teacher: ModelConfig, path: str, base_name: str) -> list[Candidate]:
    """The student in a folder, once per evaluated step count and guidance scale."""
    config = load_student_config(path, str(spec.teacher), teacher)
    assert config.guidance is not None
    counts = sorted(set(spec.steps), reverse=True) if config.is_any_step else [None]
    scales = sorted(set(spec.guidance or config.guidance_scales)) if config.takes_guidance else [config.guidance]
    students = []
    for m, w in itertools.product(counts, scales):
        name = base_name + (f"@{m}" if config.is_any_step else "") + (f" w={w:g}" if config.takes_guidance else "")
        students.append(Candidate(name, path, config, w, student_sampling(config, m, w)))
    return students


def load_student_config(path: str, teacher_path: str, teacher: ModelConfig) -> ModelConfig:
    """The config of the student in the folder ``path``.

    Raises:
        DistillKacError: the model is not a student, or its teacher is not the one in ``teacher_path``.
    """
    config = load_config(path)
    if config.kind != "student":
        raise DistillKacError(f"{path} is a {config.kind}, not a student. Choose the folder of a student.")
    if config.teacher_sha256 != teacher.weights_sha256:
        raise DistillKacError(
            f"{path} belongs to another teacher ({str(config.teacher_sha256)[:12]}...) than {teacher_path} "
            f"({teacher.weights_sha256[:12]}...). Give the teacher of the student."
        )
    return config


def student_folders(path: str) -> list[str]:
    """The folder of a student, or the folders of all students of a sweep."""
    if files.exists(files.join(path, CONFIG_FILE)):
        return [path]
    names = (name.split("/") for name in files.list_sizes(path))
    folders = [files.join(path, parts[0]) for parts in names if parts[1:] == [CONFIG_FILE]]
    if not folders:
        raise DistillKacError(f"{path} is not the folder of a student or a sweep: it has no {CONFIG_FILE}.")
    return folders


def _draw(spec: EvaluateSpec, candidates: list[Candidate]) -> Comparison:
    """Compute all samples and features into the cache, including the features of real images."""
    data = candidates[0].config.data
    spaces = open_spaces(spec.features, data)
    for space in spaces:
        facts = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in space.facts.items())
        if facts:
            log.info(f"evaluate: features of the {space.name}: {facts}")
    comparison = Comparison(spec, candidates, spaces, *real_images(data, spec.samples))
    todo = [
        *unfinished(comparison.train, unfinished_reference(comparison.train, spaces)),
        *unfinished(comparison.held_out, spaces),
    ]
    for seed, candidate in itertools.product(comparison.seeds, candidates):
        todo += unfinished(comparison.source(candidate, seed), spaces)
    make_chunks(spec, data, spaces, todo)
    return comparison


def _score_all(comparison: Comparison, fingerprint: str) -> Record:
    """The scores of real images, the teachers and the students. One set of samples is in memory at a time."""
    spec, data = comparison.spec, open_dataset(comparison.train.data)
    spaces = with_pixels(comparison.spaces, open_space(PIXELS, data))
    reference = reference_of(comparison.train, comparison.held_out, spaces, spec.samples)
    record = Record(
        fingerprint=fingerprint,
        samples=spec.samples,
        seeds=comparison.seeds,
        features=tuple(space.name for space in comparison.spaces),
        facts={space.name: space.facts for space in comparison.spaces if space.facts},
        real={"kind": comparison.train.data.kind, **data.description.model_dump(include=REAL_FACTS)},
        floor_count=reference.floor_count,
        kept_rows=KEPT_ROWS,
        scores=(),
    )
    real = Candidate("real images", "", comparison.candidates[0].config, 0.0, Sampling(0.0, 0, "euler"))
    scores = [_score(record, real, gather(comparison.held_out, spaces, reference), comparison.held_out)]
    by_seed: dict[str, list[Score]] = {candidate.name: [] for candidate in comparison.candidates}
    for seed in comparison.seeds:
        teachers: dict[float, tuple[ModelSamples, dict[str, float]]] = {}
        for candidate in comparison.candidates:
            source = comparison.source(candidate, seed)
            evaluated = gather(source, spaces, reference, *teachers.get(candidate.guidance, ()))
            by_seed[candidate.name].append(_score(record, candidate, evaluated, source))
            teachers.setdefault(candidate.guidance, (source, by_seed[candidate.name][-1].metrics))
    scores += [mean_score(scores_of_model) for scores_of_model in by_seed.values()]
    return record.model_copy(update={"scores": tuple(scores)})


def _score(record: Record, candidate: Candidate, evaluated: Evaluated, source: ModelSamples | RealImages) -> Score:
    computed = {name: metric.compute(evaluated) for name, metric in record.metrics().items()}
    is_model = isinstance(source, ModelSamples)
    return Score(
        name=candidate.name,
        kind=candidate.config.kind if is_model else REAL,
        steps=candidate.sampling.steps if is_model else None,
        guidance=candidate.guidance if is_model else None,
        refined_in=candidate.config.refined_in if is_model else (),
        any_step=candidate.name.partition("@")[0] if is_model and candidate.config.is_any_step else "",
        count=source.count,
        metrics={name: value for name, value in computed.items() if value is not None},
        fingerprint=candidate.config.fingerprint if is_model else candidate.config.data_sha256,
        folder=candidate.path,
        prefix=metric_prefix(candidate.config, candidate.sampling, candidate.guidance) if is_model else "",
    )


def _write(comparison: Comparison, run: tracking.TrackedRun, record: Record) -> None:
    """Write files and log to MLflow; ``evaluation.json``, which marks the folder as complete, comes last."""
    spec = comparison.spec
    tracking.declare(*record.metrics().values())
    images, labels = _shown(comparison)
    if max(labels) < comparison.candidates[0].config.num_classes:  # not the null labels of an unconditional model
        record = record.model_copy(update={"shown_labels": labels})
    shown = [ScoredSamples(*pair) for pair in zip(record.scores, images, strict=True)]
    curve = pictures.quality_by_nfe(_panels(record))
    contents = {
        SAMPLES_PICTURE: pictures.comparison([(score.name, images) for score, images in shown]),
        CURVE_PICTURE: curve,
        SAMPLES_FILE: _npz([images for _, images in shown]),
        TABLE_FILE: table(record).encode(),
    }
    for name, data in contents.items():
        files.write_bytes(files.join(spec.out, name), data)
    for name in (SAMPLES_PICTURE, CURVE_PICTURE, TABLE_FILE):
        run.artifact(name, contents[name])
    _track_table(run, record)
    track_models(spec, run, record, shown, curve)
    text = json.dumps(record.model_dump(mode="json"), indent=2).encode()
    run.artifact(EVALUATION_FILE, text)
    outputs.check_owner(spec.out, record.fingerprint)
    files.write_bytes(files.join(spec.out, EVALUATION_FILE), text)


def _track_table(run: tracking.TrackedRun, record: Record) -> None:
    """Log the table in the format of ``mlflow.log_table``; its tag makes MLflow's pages show it as a table."""
    columns = {"columns": head(record), "data": [row(record, score) for score in record.scores]}
    run.artifact(TABLE_JSON, json.dumps(columns).encode())
    run.tags({"mlflow.loggedArtifacts": json.dumps([{"path": TABLE_JSON, "type": "table"}])})


def _npz(rows: Sequence[np.ndarray]) -> bytes:
    sink = io.BytesIO()
    np.savez_compressed(sink, **{str(number): images for number, images in enumerate(rows)})  # type: ignore[arg-type]
    return sink.getvalue()


def read_shown(out: str) -> list[np.ndarray] | None:
    """The shown samples [shown, *sample] of each row of an evaluation; None if an older version wrote it."""
    path = files.join(out, SAMPLES_FILE)
    if not files.exists(path):
        return None
    with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as arrays:
        return [arrays[str(number)] for number in range(len(arrays.files))]


def _shown(comparison: Comparison) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """The first samples of each row of the table, and their labels.

    The held-out images have the same labels, as far as there are such images.
    """
    sources = [comparison.source(candidate, comparison.seeds[0]) for candidate in comparison.candidates]
    samples = [source.rows(chunks(source)[0].ids) for source in sources]
    real = comparison.held_out.rows(range(min(CHUNK_ROWS, comparison.held_out.count)))
    labels = samples[0].label[:SHOWN_SAMPLES].tolist()
    chosen = _match_labels(labels, real.label.tolist())
    return [real.images[chosen].numpy(), *(rows.images[:SHOWN_SAMPLES].numpy() for rows in samples)], tuple(labels)


def _match_labels(wanted: Sequence[int], labels: Sequence[int]) -> torch.Tensor:
    """For each wanted label, the index of an unused equal label, or of any unused label if none is equal."""
    free = list(range(len(labels)))
    chosen = []
    for label in wanted[: len(labels)]:
        index = next((index for index in free if labels[index] == label), free[0])
        free.remove(index)
        chosen.append(index)
    return torch.tensor(chosen)


def _panels(record: Record) -> list[pictures.Panel]:
    """The plotted metrics. Frechet distances depend on the count, so they are shown at the count of the real images."""
    models, (real,), metrics = record.scores[1:], record.scores[:1], record.metrics()
    shown = [metrics.get(at_floor_count(metric.name), metric) for metric in metrics.values() if metric.is_plotted]
    return [
        pictures.Panel(
            metric,
            [
                pictures.Point(
                    s.kind, s.any_step or "students", s.guidance or 0.0, s.metrics["nfe"], s.metrics[metric.name]
                )
                for s in models
            ],
            real.metrics.get(metric.name),
            real.count,
        )
        for metric in shown
        if all(metric.name in score.metrics for score in models)
    ]
