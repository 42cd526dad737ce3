"""The evaluation stage: scores held-out images, and samples of the teacher and its students from the same noise."""

import itertools
from collections.abc import Sequence
from typing import Any

from kac.data import open_dataset
from kac.metrics import Evaluated, Reference, quality_metrics
from kac.metrics.features import TORCHSCRIPT, open_space, space_identity
from kac.metrics.quality import MEMORISATION_ROWS, PIXELS
from kac.metrics.statistics import KEPT_ROWS
from kac.model import learned_images, load_teacher_config
from kac.sampling import student_sampling, teacher_sampling
from kac.util import files
from kac.util.log import log
from kac.util.path_options import check_apart
from pipeline import outputs, tracking
from pipeline.cluster import storage
from pipeline.cluster.placement import choose_actors, wait_for_capacity
from pipeline.config import EvaluateSpec
from pipeline.evaluate.compute import make_chunks, open_spaces, try_features
from pipeline.evaluate.inputs import Candidate, find_candidates, resolve
from pipeline.evaluate.results import write_results
from pipeline.evaluate.samples import (
    Comparison,
    DecodedImages,
    ModelSamples,
    RealImages,
    gather,
    statistics_file,
    training_statistics,
    unfinished,
)
from pipeline.evaluate.scores import DECODED, EVALUATION_FILE, REAL, Record, Score, mean_score, read_record, table

REAL_FACTS = {"train", "held_out", "sha256", "split", "class_names"}
"""The fields of the data's description that are copied into a record."""

tracking.declare(*quality_metrics(EvaluateSpec.model_fields["features"].default).values())


def evaluate(spec: EvaluateSpec, parent: tracking.TrackedRun | None = None, *, is_part: bool = False) -> list[Score]:
    """Score held-out images and every model, print the table, and write ``evaluation.json`` and the pictures.

    Each student is compared with the teacher at the student's guidance scale. A model's scores are added to the run
    that produced the model, and the evaluation's run has the comparison. Samples stay in the cache. A stopped
    evaluation can therefore resume, and the next evaluation of the same teacher draws only its students' samples.

    Args:
        parent: the run of the demo that this evaluation is part of.
        is_part: whether a sweep joins this evaluation with others. If so, print no table.

    Raises:
        DistillKacError: a model is missing, a student has a different teacher, the data do not match the teacher, or a
            feature space is missing or does not work with the data.
    """
    spec = resolve(spec)
    data_paths = load_teacher_config(str(spec.teacher)).data.paths(" of the teacher")
    check_apart(spec, data_paths)
    paths = {
        "`out`": spec.out,
        "`teacher`": spec.teacher,
        "`students`": spec.students,
        "`features`": [given for given in spec.features if given.endswith(TORCHSCRIPT)],
        **data_paths,
    }
    storage.check_shared({**paths, **storage.cache_of()}, lambda: spec.actors != 0)
    spec = spec.settled(lambda: choose_actors(spec).on_gpu)
    candidates = find_candidates(spec)
    config = candidates[0].config
    content = _content(spec, candidates)
    if not files.exists(files.join(spec.out, EVALUATION_FILE)):
        try_features(spec, config.data)
    if not outputs.begin(spec.out, spec, EVALUATION_FILE, **content):
        record = read_record(spec.out)
        if not is_part:
            log.info(f"evaluate: {spec.out} is complete: nothing to do\n{table(record)}")
        return list(record.scores)
    if spec.actors or (spec.actors is None and (spec.gpu or spec.label_selector)):
        # Wait until one actor can start. The number of actors that the work needs is not known yet.
        wait_for_capacity("evaluate", "`actors`", 1, choose_actors(spec).resources)
    fingerprint = spec.fingerprint(**content)
    inputs = {f"{c.config.kind}.{c.name}": c.config.fingerprint for c in candidates}
    datasets = [tracking.LoggedDataset(config.data.kind, config.data_sha256, config.data.origin, "evaluation")]
    with tracking.start_run(
        spec=spec, fingerprint=fingerprint, inputs=inputs, output=spec.out, parent=parent, datasets=datasets
    ) as run:
        comparison = _draw(spec, candidates)
        record = _score_all(comparison, fingerprint)
        write_results(comparison, run, record)
    if not is_part:
        log.info(table(record))
    return list(record.scores)


def draw_samples(specs: Sequence[EvaluateSpec]) -> None:
    """Compute the samples and features of several unfinished evaluations together, for ``evaluate`` to read.

    The evaluations may differ only in their models and their output.
    """
    todo = [resolve(spec) for spec in specs if not files.exists(files.join(spec.out, EVALUATION_FILE))]
    if len(todo) > 1:
        _draw(todo[0], [candidate for spec in todo for candidate in find_candidates(spec)])


def _content(spec: EvaluateSpec, candidates: list[Candidate]) -> dict[str, Any]:
    """Inputs for an evaluation's fingerprint: hashes of the models' weights and of the feature files."""
    config = candidates[0].config
    data = learned_images(candidates[0].path, config)
    identities = [space_identity(given, data) for given in spec.features]
    hashes = {identity["space"]: identity["sha256"] for identity in identities if "sha256" in identity}
    models = {candidate.name: candidate.config.weights_sha256 for candidate in candidates}
    autoencoder = {"autoencoder": config.autoencoder_sha256} if config.autoencoder_sha256 else {}
    return {"models": models, "images": "delivered", **autoencoder, **({"feature_files": hashes} if hashes else {})}


def _draw(spec: EvaluateSpec, candidates: list[Candidate]) -> Comparison:
    """Compute all samples and features, including the features of real images, and store them in the cache."""
    data = candidates[0].config.data
    spaces = open_spaces(spec.features, data)
    description = open_dataset(data.images).description
    train = RealImages(data, description.sha256, "train", description.train)
    held_out = RealImages(data, description.sha256, "held_out", min(spec.samples, description.held_out))
    decoded = DecodedImages(held_out, candidates[0].config, held_out.count) if data.autoencoder else None
    comparison = Comparison(spec, candidates, spaces, train, held_out, decoded)
    todo = unfinished(train, [space for space in spaces if not files.exists(statistics_file(train, space))])
    todo += unfinished(held_out, spaces) + (unfinished(decoded, spaces) if decoded else [])
    for seed, candidate in itertools.product(comparison.seeds, candidates):
        todo += unfinished(comparison.source(candidate, seed), spaces)
    for space in spaces if todo else ():
        if space.facts:
            facts = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in space.facts.items())
            log.info(f"evaluate: features of the {space.name}: {facts}")
    make_chunks(spec, data, spaces, todo)
    return comparison


def _score_all(comparison: Comparison, fingerprint: str) -> Record:
    """Score real images, the teachers and the students, with only one set of samples in memory at a time."""
    spec, _, of_spec, train, held_out, decoded = comparison
    data = open_dataset(train.data.images)
    pixels = open_space(PIXELS, data)
    spaces = [pixels, *(space for space in of_spec if space.name != PIXELS)]  # some metrics always need pixels
    shown = pixels(held_out.rows(range(min(held_out.count, MEMORISATION_ROWS))).images)
    floor_count = held_out.count if held_out.count < spec.samples else None
    statistics = {space.name: training_statistics(train, space) for space in spaces}
    reference = Reference(statistics, shown, lambda: pixels.of_training_images(data), floor_count)
    real_images = gather(held_out, spaces, reference)
    reference.held_out_statistics = real_images.statistics
    record = Record(
        fingerprint=fingerprint,
        samples=spec.samples,
        seeds=comparison.seeds,
        features=tuple(space.name for space in of_spec),
        facts={space.name: space.facts for space in of_spec if space.facts},
        real={"kind": train.data.kind, **data.description.model_dump(include=REAL_FACTS)},
        floor_count=floor_count,
        kept_rows=KEPT_ROWS,
        solver=spec.solver,
        knot_grid=spec.knot_grid,
        time_factor=spec.time_factor,
        scores=(),
    )
    real = Score(
        name="real images",
        kind=REAL,
        steps=None,
        guidance=None,
        count=held_out.count,
        metrics=_metrics(record, real_images),
        fingerprint=train.sha256,
    )
    floors = [real]
    if decoded is not None:
        metrics = _metrics(record, gather(decoded, spaces, reference))
        name = "held-out images through the autoencoder"
        floors.append(real.model_copy(update={"name": name, "kind": DECODED, "metrics": metrics}))
    by_name: dict[str, list[Score]] = {candidate.name: [] for candidate in comparison.candidates}
    for seed in comparison.seeds:
        teachers: dict[float, tuple[ModelSamples, dict[str, float]]] = {}
        for candidate in comparison.candidates:
            source = comparison.source(candidate, seed)
            evaluated = gather(source, spaces, reference, *teachers.get(candidate.guidance, ()))
            score = _score(candidate, source.count, _metrics(record, evaluated))
            by_name[candidate.name].append(score)
            teachers.setdefault(candidate.guidance, (source, score.metrics))
    return record.model_copy(update={"scores": (*floors, *map(mean_score, by_name.values()))})


def _metrics(record: Record, evaluated: Evaluated) -> dict[str, float]:
    computed = {name: metric.compute(evaluated) for name, metric in record.metrics().items()}
    return {name: value for name, value in computed.items() if value is not None}


def _score(candidate: Candidate, count: int, metrics: dict[str, float]) -> Score:
    name, path, config, guidance, sampling = candidate
    # With the model's default sampling and its own guidance scale, metrics have no prefix.
    is_teacher = config.kind == "teacher"
    default, own_scale = (teacher_sampling if is_teacher else student_sampling)(config), config.guidance or 0.0
    parts = {
        "solver": sampling.solver,
        "knot_grid": sampling.knot_grid,
        "time_factor": f"time_factor_{sampling.time_factor:g}",
        "steps": f"steps_{sampling.steps}",
    }
    prefix = "".join(f"{part}/" for name, part in parts.items() if getattr(sampling, name) != getattr(default, name))
    prefix += f"guidance_{guidance:g}/" if guidance != own_scale else ""
    return Score(
        name=name,
        kind=config.kind,
        steps=sampling.steps,
        guidance=guidance,
        refined_in=config.refined_in,
        any_step=name.rpartition("@")[0] if config.is_any_step else "",
        count=count,
        metrics=metrics,
        fingerprint=config.fingerprint,
        folder=path,
        prefix=prefix,
    )
