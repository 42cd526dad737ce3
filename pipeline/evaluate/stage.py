"""Evaluate: real images, the teacher and its students from the same noise, in one table, one picture and one curve."""

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
from pipeline.cluster.actor_place import choose_place
from pipeline.cluster.placement import await_room
from pipeline.config.specs import EvaluateSpec
from pipeline.evaluate.actors import make_chunks, open_spaces
from pipeline.evaluate.feature_trial import try_features
from pipeline.evaluate.gather import gather, real_images, reference_of, unfinished_reference, with_pixels
from pipeline.evaluate.inputs import resolve
from pipeline.evaluate.model_runs import (
    CURVE_PICTURE,
    SAMPLES_PICTURE,
    SHOWN,
    TABLE_FILE,
    Shown,
    prefix_of,
    track_models,
)
from pipeline.evaluate.scores import EVALUATION_FILE, REAL, Record, Score, head, mean_score, read_record, row, table
from pipeline.evaluate.sources import CHUNK_ROWS, ModelSamples, RealImages, chunks, unfinished
from pipeline.report import pictures

SAMPLES_FILE = "samples.npz"
"""The shown samples of each row of the table, under the row's number."""

TABLE_JSON = "table.json"

REAL_FACTS = {"train", "held_out", "sha256", "split", "class_names"}
"""What a record says of the data."""

tracking.declare(*quality_metrics(EvaluateSpec.model_fields["features"].default).values())


class Candidate(NamedTuple):
    """A model in the comparison, and how it is sampled."""

    name: str
    path: str
    config: ModelConfig
    guidance: float  # chosen for a teacher, built into a student
    sampling: Sampling


class Comparison(NamedTuple):
    """What is compared, and in which features."""

    spec: EvaluateSpec
    candidates: list[Candidate]
    spaces: list[FeatureSpace]
    train: RealImages
    held_out: RealImages

    def source(self, candidate: Candidate, seed: int) -> ModelSamples:
        """A candidate's samples of a noise seed."""
        _, path, config, _, sampling = candidate
        return ModelSamples(path, config, sampling, self.spec.precision, seed, self.spec.samples, self.spec.batch_size)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The noise seeds."""
        return tuple(range(self.spec.seed, self.spec.seed + self.spec.seeds))


def evaluate(spec: EvaluateSpec, parent: tracking.TrackedRun | None = None) -> list[Score]:
    """Score held-out images and every model, print the table and write ``evaluation.json`` and the pictures.

    What was found of a model is added to the run that has made it; the evaluation's own run keeps the comparison.

    Each student is compared with the teacher at the student's own guidance scale. What is drawn stays in the cache: a
    stopped evaluation goes on from there, and another one of the same teacher draws its students alone.

    Raises:
        DistillKacError: a model is missing, a student is of another teacher, the data are not the teacher's, or a
            feature space cannot be had or its network does not work on the data.
    """
    spec = resolve(spec)
    assert spec.teacher is not None, "a spec that is resolved has a teacher"
    root = load_teacher_config(spec.teacher).data.root
    check_apart(spec, {"`data.root` of the teacher": root})
    _check_storage(spec, root)
    spec = spec.settled(lambda: choose_place(spec).on_gpu)
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
        # For one at least; how many there is work for shows later.
        await_room("evaluate", "`actors`", 1, choose_place(spec).share)
    fingerprint = spec.fingerprint(**content)
    inputs = {f"{c.config.kind}.{c.name}": c.config.fingerprint for c in candidates}
    data = candidates[0].config.data
    judged_on = [tracking.Dataset(data.kind, candidates[0].config.data_sha256, data.root or data.kind, "evaluation")]
    with tracking.start_run(
        spec=spec, fingerprint=fingerprint, inputs=inputs, output=spec.out, parent=parent, datasets=judged_on
    ) as run:
        compared = _draw(spec, candidates)
        record = _judge(compared, fingerprint)
        _write(compared, run, record)
    log.info(table(record))
    return list(record.scores)


def _check_storage(spec: EvaluateSpec, root: str | None) -> None:
    """Refuse paths that only one of several machines sees; ``root``: of the teacher's data."""
    is_spread = spec.actors != 0
    files_used = [given for given in spec.features if given.endswith(TORCHSCRIPT)]
    storage.check_shared(
        {
            "`out`": spec.out,
            "`teacher`": spec.teacher,
            "`students`": spec.students,
            "`features`": files_used,
            **storage.cache_of(),
        },
        lambda: is_spread,
    )
    storage.check_shared({"`data.root` of the teacher": root}, lambda: is_spread)


def _content(spec: EvaluateSpec, candidates: list[Candidate]) -> dict[str, Any]:
    """What the fingerprint of an evaluation says of its inputs: models, and the features that are files."""
    data = learned_data(candidates[0].path, candidates[0].config)
    identities = [space_identity(given, data) for given in spec.features]
    files_used = {identity["space"]: identity["sha256"] for identity in identities if "sha256" in identity}
    models = {candidate.name: candidate.config.weights_sha256 for candidate in candidates}
    return {"models": models, "images": "delivered", **({"feature_files": files_used} if files_used else {})}


def read_scores(out: str) -> list[Score]:
    """The scores in an evaluation's folder; raises as ``read_record``."""
    return list(read_record(out).scores)


def _candidates(spec: EvaluateSpec) -> list[Candidate]:
    assert spec.teacher is not None, "a spec that is resolved has a teacher"
    teacher = load_teacher_config(spec.teacher)
    check_guidance(teacher, spec.guidance)
    folders = [path for given in spec.students for path in student_folders(given)]
    names = _names(list(dict.fromkeys(folders)))
    students = [student for path, name in names.items() for student in _students(spec, teacher, path, name)]
    if spec.guidance and not any(student.config.takes_guidance for student in students):
        raise ArgumentError(
            "`guidance`: no student here takes a guidance scale as an input, so there is nothing to choose. Leave "
            "`guidance` out, or distill a student with `guidance` all."
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
    """What the students in these folders are called: as their folders are, with as much before it as tells apart."""
    names = {path: path.rsplit("/", 1)[-1] for path in folders}
    for depth in itertools.count(2):
        counts = Counter(names.values())
        if max(counts.values(), default=1) == 1:
            break
        names |= {path: "/".join(path.split("/")[-depth:]) for path, name in names.items() if counts[name] > 1}
    return names


def _students(spec: EvaluateSpec, teacher: ModelConfig, path: str, bare: str) -> list[Candidate]:
    """The student in a folder; one that takes any step count or guidance scale is several candidates."""
    config = load_student_config(path, str(spec.teacher), teacher)
    assert config.guidance is not None
    counts = sorted(set(spec.steps), reverse=True) if config.is_any_step else [None]
    scales = sorted(set(spec.guidance or config.guidance_scales)) if config.takes_guidance else [config.guidance]
    found = []
    for m, w in itertools.product(counts, scales):
        name = bare + (f"@{m}" if config.is_any_step else "") + (f" w={w:g}" if config.takes_guidance else "")
        found.append(Candidate(name, path, config, w, student_sampling(config, m, w)))
    return found


def load_student_config(path: str, teacher_path: str, teacher: ModelConfig) -> ModelConfig:
    """The config of the student in the folder ``path``.

    Raises:
        DistillKacError: it is no student, or one of another teacher than the one in ``teacher_path``.
    """
    config = load_config(path)
    if config.kind != "student":
        raise DistillKacError(f"{path}: expected a student, found a {config.kind}")
    if config.teacher_sha256 != teacher.weights_sha256:
        raise DistillKacError(
            f"{path}: expected a student of the teacher {teacher.weights_sha256[:12]}... in {teacher_path}, "
            f"found one of {str(config.teacher_sha256)[:12]}...: give its own teacher"
        )
    return config


def student_folders(path: str) -> list[str]:
    """A student's folder, or those below a sweep's."""
    if files.exists(files.join(path, CONFIG_FILE)):
        return [path]
    below = (name.split("/") for name in files.list_sizes(path))
    found = [files.join(path, parts[0]) for parts in below if parts[1:] == [CONFIG_FILE]]
    if not found:
        raise DistillKacError(f"{path}: expected a student's folder or a sweep's, found no {CONFIG_FILE} there")
    return found


def _draw(spec: EvaluateSpec, candidates: list[Candidate]) -> Comparison:
    """Bring all samples and features into the cache, those of real images too."""
    data = candidates[0].config.data
    spaces = open_spaces(spec.features, data)
    for space in spaces:
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in space.facts.items())
        if told:
            log.info(f"evaluate: features of the {space.name}: {told}")
    compared = Comparison(spec, candidates, spaces, *real_images(data, spec.samples))
    todo = [
        *unfinished(compared.train, unfinished_reference(compared.train, spaces)),
        *unfinished(compared.held_out, spaces),
    ]
    for seed, candidate in itertools.product(compared.seeds, candidates):
        todo += unfinished(compared.source(candidate, seed), spaces)
    make_chunks(spec, data, spaces, todo)
    return compared


def _judge(compared: Comparison, fingerprint: str) -> Record:
    """The scores of real images and of every candidate, teachers first; one set of samples in memory at a time."""
    spec, data = compared.spec, open_dataset(compared.train.data)
    spaces = with_pixels(compared.spaces, open_space(PIXELS, data))
    reference = reference_of(compared.train, compared.held_out, spaces, spec.samples)
    record = Record(
        fingerprint=fingerprint,
        samples=spec.samples,
        seeds=compared.seeds,
        features=tuple(space.name for space in compared.spaces),
        facts={space.name: space.facts for space in compared.spaces if space.facts},
        real={"kind": compared.train.data.kind, **data.description.model_dump(include=REAL_FACTS)},
        floor_count=reference.floor_count,
        kept_rows=KEPT_ROWS,
        scores=(),
    )
    real = Candidate("real images", "", compared.candidates[0].config, 0.0, Sampling(0.0, 0, "euler"))
    scores = [_score(record, real, gather(compared.held_out, spaces, reference), compared.held_out)]
    by_seed: dict[str, list[Score]] = {candidate.name: [] for candidate in compared.candidates}
    for seed in compared.seeds:
        teachers: dict[float, tuple[ModelSamples, dict[str, float]]] = {}
        for candidate in compared.candidates:
            source = compared.source(candidate, seed)
            judged = gather(source, spaces, reference, *teachers.get(candidate.guidance, ()))
            by_seed[candidate.name].append(_score(record, candidate, judged, source))
            teachers.setdefault(candidate.guidance, (source, by_seed[candidate.name][-1].metrics))
    scores += [mean_score(found) for found in by_seed.values()]
    return record.model_copy(update={"scores": tuple(scores)})


def _score(record: Record, candidate: Candidate, judged: Evaluated, source: ModelSamples | RealImages) -> Score:
    computed = {name: metric.compute(judged) for name, metric in record.metrics().items()}
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
        prefix=prefix_of(candidate.config, candidate.sampling, candidate.guidance) if is_model else "",
    )


def _write(compared: Comparison, run: tracking.TrackedRun, record: Record) -> None:
    spec = compared.spec
    tracking.declare(*record.metrics().values())
    images, labels = _shown(compared)
    if max(labels) < compared.candidates[0].config.num_classes:  # an unconditional model has no others
        record = record.model_copy(update={"shown_labels": labels})
    shown = [Shown(*pair) for pair in zip(record.scores, images, strict=True)]
    curve = pictures.quality_by_nfe(_panels(record))
    made = {
        SAMPLES_PICTURE: pictures.comparison([(score.name, images) for score, images in shown]),
        CURVE_PICTURE: curve,
        SAMPLES_FILE: _packed([images for _, images in shown]),
        TABLE_FILE: table(record).encode(),
    }
    for name, data in made.items():
        files.write_bytes(files.join(spec.out, name), data)
    for name in (SAMPLES_PICTURE, CURVE_PICTURE, TABLE_FILE):
        run.artifact(name, made[name])
    _track_table(run, record)
    track_models(spec, run, record, shown, curve)
    text = json.dumps(record.model_dump(mode="json"), indent=2).encode()
    run.artifact(EVALUATION_FILE, text)
    outputs.check_owner(spec.out, record.fingerprint)
    files.write_bytes(files.join(spec.out, EVALUATION_FILE), text)


def _track_table(run: tracking.TrackedRun, record: Record) -> None:
    """The table as ``mlflow.log_table`` leaves one: MLflow's page shows what this tag lists as a table."""
    columns = {"columns": head(record), "data": [row(record, score) for score in record.scores]}
    run.artifact(TABLE_JSON, json.dumps(columns).encode())
    run.tags({"mlflow.loggedArtifacts": json.dumps([{"path": TABLE_JSON, "type": "table"}])})


def _packed(rows: Sequence[np.ndarray]) -> bytes:
    sink = io.BytesIO()
    np.savez_compressed(sink, **{str(number): images for number, images in enumerate(rows)})  # type: ignore[arg-type]
    return sink.getvalue()


def read_shown(out: str) -> list[np.ndarray] | None:
    """The shown samples [shown, *sample] of each row of an evaluation; None for one of an older version."""
    path = files.join(out, SAMPLES_FILE)
    if not files.exists(path):
        return None
    with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as found:
        return [found[str(number)] for number in range(len(found.files))]


def _shown(compared: Comparison) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """The first samples of every row of the table, and their labels.

    Held-out images are of the same labels where there are such.
    """
    made = [
        compared.source(candidate, compared.seeds[0]).rows(chunks(compared.source(candidate, compared.seeds[0]))[0].ids)
        for candidate in compared.candidates
    ]
    real = compared.held_out.rows(range(min(CHUNK_ROWS, compared.held_out.count)))
    labels = made[0].label[:SHOWN].tolist()
    places = _matching(labels, real.label.tolist())
    return [real.images[places].numpy(), *(rows.images[:SHOWN].numpy() for rows in made)], tuple(labels)


def _matching(wanted: Sequence[int], labels: Sequence[int]) -> torch.Tensor:
    """For each wanted label the place of one of ``labels`` that is that, or else of any, each place at most once."""
    free = list(range(len(labels)))
    places = []
    for label in wanted[: len(labels)]:
        place = next((place for place in free if labels[place] == label), free[0])
        free.remove(place)
        places.append(place)
    return torch.tensor(places)


def _panels(record: Record) -> list[pictures.Panel]:
    """The plotted metrics; a Frechet distance, which depends on the count, is shown at that of the real images."""
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
