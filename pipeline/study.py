"""Study: test the claims of the papers on Kac flows with a teacher, its store, its students and a Gaussian rival.

Each claim has a module in ``kac/study/`` that measures it. This module opens the inputs and describes the results. A
claim whose inputs are missing is skipped, and the reason is given.
"""

import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kac.conditioning import guidance_problem, known_classes
from kac.data import Dataset
from kac.guidance import check_guidance
from kac.metrics import Metric, Moments
from kac.metrics.distances import frechet_distance, nearest_distances
from kac.metrics.features import FeatureSpace, open_space
from kac.metrics.features.classifier import Classifier
from kac.metrics.quality import PIXELS
from kac.model import ModelConfig, learned_data, load_model, load_teacher_config
from kac.networks import VelocityNetwork
from kac.sampling import TEACHER_STEPS, Sampling, student_sampling, teacher_sampling
from kac.solvers import STEPPERS, knot_times
from kac.study.guidance_scales import effect_of_guidance
from kac.study.marginals import marginal
from kac.study.memorisation import energy_and_nearness
from kac.study.plane import distance_to, travel
from kac.study.solver_steps import STEPS, moments_in, quality_by_solver
from kac.study.speed_limit import speeds
from kac.study.stability import stability
from kac.study.subject import Subject
from kac.util import files
from kac.util.device import default_device
from kac.util.errors import ArgumentError, DistillKacError
from kac.util.images import delivered
from kac.util.log import log
from kac.util.options import flatten
from kac.util.path_options import check_apart
from pipeline import outputs, store, tracking
from pipeline.cluster import connection as cluster
from pipeline.config import StudySpec
from pipeline.evaluate.sources import images_in_parts
from pipeline.evaluate.stage import load_student_config, student_folders
from pipeline.report import study_plots
from pipeline.store.layout import KINETIC_ENERGY, LABEL, knot_column

STUDY_FILE = "study.json"


@dataclass(frozen=True)
class ClaimResult:
    """The measurements of a claim."""

    text: str  # line in the printed table
    values: dict[str, Any]  # entry in study.json; by model if there are several
    metrics: dict[str, float]  # for MLflow, named MEASURE/MODEL or MEASURE
    picture: bytes = field(repr=False)


Outcome = ClaimResult | str
"""The result of a claim, or the reason why the claim is left out."""


@dataclass(frozen=True)
class Inputs:
    """The models, the store and the data of a study. Networks are loaded on first use."""

    spec: StudySpec
    teacher: ModelConfig
    students: tuple[tuple[str, ModelConfig], ...]  # folder and config
    rival: ModelConfig | None
    store: store.Store | None
    data: Dataset

    @functools.cached_property
    def spaces(self) -> list[FeatureSpace]:
        """The feature spaces: pixels, and the classifier's features if there are several classes."""
        names = [PIXELS, *(["classifier"] if self.teacher.num_classes > 1 else [])]
        return [open_space(name, self.data, default_device()) for name in names]

    @functools.cached_property
    def train(self) -> dict[str, Moments]:
        """The moments of the training images in each space."""
        return moments_in(self.spaces, images_in_parts(self.data))

    @functools.cached_property
    def floor(self) -> tuple[int, dict[str, float]]:
        """The number of held-out images (at most ``samples``), and their Frechet distance in each feature space."""
        count = min(self.spec.samples, len(self.data.held_out))
        chosen = torch.randperm(len(self.data.held_out), generator=torch.Generator().manual_seed(0))[:count]
        by_space = moments_in(self.spaces, [delivered(self.data.held_out.rows(chosen).images)])
        return count, {name: frechet_distance(self.train[name], moments) for name, moments in by_space.items()}

    def _teacher_sampling(self, guidance: float, steps: int) -> Sampling:
        """The sampling of the store, or without a store the default sampling with a multiple of ``steps`` solver steps.

        Raises:
            ArgumentError: the teacher cannot be guided.
        """
        if self.store is not None:
            check_guidance(self.teacher, [guidance])
            identity = self.store.identity
            return Sampling(guidance, identity.solver_steps, identity.solver, identity.knot_grid)
        return teacher_sampling(self.teacher, guidance, -(-TEACHER_STEPS // steps) * steps)

    def teacher_subject(self, guidance: float = 0.0, steps: int = 1) -> Subject:
        """The teacher. Its number of solver steps is a multiple of ``steps``, unless the store fixes the number."""
        return self._subject("teacher", self.spec.teacher, self.teacher, self._teacher_sampling(guidance, steps))

    def teachers(self) -> list[Subject]:
        """The teacher and the rival, with the same sampling and without guidance."""
        if self.rival is None:
            return [self.teacher_subject()]
        assert self.spec.rival is not None
        rival = self._subject("rival", self.spec.rival, self.rival, self._teacher_sampling(0.0, 1))
        return [self.teacher_subject(), rival]

    def student_subjects(self, guidance: float | None = None) -> list[Subject]:
        """The students; an any-step student once per step count.

        Args:
            guidance: keep only students that can be sampled at this scale. None keeps all, each at its own scale.
        """
        subjects = []
        for path, config in self.students:
            scales = config.guidance_scales if config.takes_guidance else (config.guidance,)
            if guidance is not None and guidance not in scales:
                continue
            for steps in self._step_counts(config):
                name = path.rsplit("/", 1)[-1] + (f"@{steps}" if config.is_any_step else "")
                subjects.append(self._subject(name, path, config, student_sampling(config, steps, guidance)))
        return subjects

    def _step_counts(self, config: ModelConfig) -> list[int | None]:
        if not config.is_any_step:
            return [None]
        knots = self.store.identity.knots if self.store is not None else TEACHER_STEPS
        return [steps for steps in sorted(set(self.spec.steps)) if knots % steps == 0]

    def _subject(self, name: str, path: str, config: ModelConfig, sampling: Sampling) -> Subject:
        spec = self.spec
        network = self._networks(path)
        return Subject(name, network, config, sampling, default_device(), spec.seed, spec.samples, spec.batch_size)

    @functools.cached_property
    def _networks(self) -> Callable[[str], VelocityNetwork]:
        """Loads each network once, and compiles it once if ``precision.compile`` is set."""
        return functools.cache(lambda path: self.spec.precision.wrap(load_model(path, default_device()).network))


def study(spec: StudySpec, parent: tracking.TrackedRun | None = None) -> dict[str, str]:
    """Measure every claim, print one line per claim, and write ``study.json`` and the pictures.

    Returns:
        The printed lines by claim.

    Raises:
        DistillKacError: a model or the store is missing or belongs to another teacher, or the rival is not comparable.
    """
    spec = spec.settled(torch.cuda.is_available)
    spec = cluster.absolute_paths(spec, "teacher", "store", "students", "rival", "out")
    inputs = _open(spec)
    check_apart(spec, {"`data.root` of the teacher": inputs.teacher.data.root})
    content = _content(inputs)
    if not outputs.begin(spec.out, spec, STUDY_FILE, **content):
        log.info(f"study: {spec.out} is complete: nothing to do")
        claims = json.loads(files.read_bytes(files.join(spec.out, STUDY_FILE)))["claims"]
        return _log_table({claim: entry["found"] for claim, entry in claims.items()})
    fingerprint = spec.fingerprint(**content)
    with tracking.start_run(
        spec=spec, fingerprint=fingerprint, inputs=_fingerprints(inputs), output=spec.out, parent=parent
    ) as run:
        outcomes: dict[str, Outcome] = {}
        for claim in spec.claims:
            outcomes[claim] = MEASURES[claim](inputs)
            _track(spec, run, fingerprint, claim, outcomes[claim])
        _write(spec, run, fingerprint, outcomes)
    return _log_table({claim: _line(outcome) for claim, outcome in outcomes.items()})


def _open(spec: StudySpec) -> Inputs:
    """Open the inputs and check that they belong together."""
    teacher = load_teacher_config(spec.teacher)
    data = learned_data(spec.teacher, teacher)
    folders = [path for given in spec.students for path in student_folders(given)]
    students = tuple((path, load_student_config(path, spec.teacher, teacher)) for path in folders)
    check_guidance(teacher, [w for _, config in students if (w := config.guidance) is not None])
    names = [path.rsplit("/", 1)[-1] for path in folders]
    if len(set(names)) < len(names):
        raise ArgumentError(f"`students` have folders of the same name: {', '.join(names)}. Rename one of them.")
    opened = None if spec.store is None else store.open(spec.store)
    if opened is not None and opened.identity.teacher_sha256 != teacher.weights_sha256:
        raise DistillKacError(
            f"{spec.store} belongs to another teacher ({opened.identity.teacher_sha256[:12]}...) than {spec.teacher} "
            f"({teacher.weights_sha256[:12]}...). Give the teacher of the store."
        )
    return Inputs(spec, teacher, students, _check_rival(spec, teacher), opened, data)


def _check_rival(spec: StudySpec, teacher: ModelConfig) -> ModelConfig | None:
    """The config of the rival, after a check that it is comparable with the teacher."""
    if spec.rival is None:
        return None
    rival = load_teacher_config(spec.rival)
    if rival.path.kind != "gaussian":
        raise ArgumentError(f"`rival` {spec.rival} has a {rival.path.kind} path. Choose a rival with a gaussian path.")
    if bool(known_classes(rival)) != bool(known_classes(teacher)):
        kinds = ("conditional", "unconditional") if known_classes(rival) else ("unconditional", "conditional")
        raise ArgumentError(f"`rival` {spec.rival} is {kinds[0]}, but the teacher is {kinds[1]}. Choose another rival.")
    if rival.data_sha256 != teacher.data_sha256:
        raise ArgumentError(
            f"`rival` {spec.rival} learned other data ({rival.data_sha256[:12]}...) than the teacher "
            f"({teacher.data_sha256[:12]}...). Train the rival on the teacher's data."
        )
    ours, theirs = _budget(spec.teacher, teacher), _budget(spec.rival, rival)
    unequal = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if unequal:
        differences = ", ".join(f"{name} is {theirs[name]} instead of {ours[name]}" for name in unequal)
        raise ArgumentError(
            f"`rival` {spec.rival} has another network or training budget than the teacher: {differences}. Train a "
            "rival with the same values."
        )
    return rival


def _budget(path: str, config: ModelConfig) -> dict[str, Any]:
    """The options of the network, and the updates and batch size of its training unless the teacher was converted."""
    network = flatten({"network": config.network.model_dump(mode="json")})
    try:
        options = json.loads(files.read_bytes(files.join(path, outputs.SPEC_FILE)))["options"]
    except FileNotFoundError:
        return network
    optimizer = options.get("optimizer", {})
    return {**network, **{name: optimizer[name] for name in ("updates", "batch_size") if name in optimizer}}


def _content(inputs: Inputs) -> dict[str, Any]:
    """The inputs in the fingerprint of a study."""
    students = {path.rsplit("/", 1)[-1]: config.weights_sha256 for path, config in inputs.students}
    models: dict[str, Any] = {"teacher": inputs.teacher.weights_sha256, "students": students}
    if inputs.rival is not None:
        models["rival"] = inputs.rival.weights_sha256
    if inputs.store is None:
        return models
    w = min(inputs.store.guidance)
    rows = min(inputs.spec.samples, inputs.store.rows(w))
    return {**models, "store": {"identity": inputs.store.identity.fingerprint(), "guidance": w, "rows": rows}}


def _fingerprints(inputs: Inputs) -> dict[str, str]:
    """The fingerprints of the inputs, for the tags of the run."""
    students = {f"student.{path.rsplit('/', 1)[-1]}": config.fingerprint for path, config in inputs.students}
    rival = {} if inputs.rival is None else {"rival": inputs.rival.fingerprint}
    rollout = {} if inputs.store is None else {"rollout": inputs.store.identity.fingerprint()}
    return {"teacher": inputs.teacher.weights_sha256, **rollout, **students, **rival}


def _track(spec: StudySpec, run: tracking.TrackedRun, fingerprint: str, claim: str, outcome: Outcome) -> None:
    """Write the picture of a claim, and log it with the claim's metrics."""
    if isinstance(outcome, str):
        return
    # MLflow allows only some characters in a name.
    named = {re.sub(r"[^\w./ -]", "_", f"{claim}/{name}"): value for name, value in outcome.metrics.items()}
    finite = {name: value for name, value in named.items() if math.isfinite(value)}
    tracking.declare(*(Metric(name, f"measures the claim {claim}; see {STUDY_FILE}") for name in finite))
    run.metrics(finite)
    picture = f"{claim}.png"
    outputs.check_owner(spec.out, fingerprint)
    files.write_bytes(files.join(spec.out, picture), outcome.picture)
    run.artifact(picture, outcome.picture)


def _write(spec: StudySpec, run: tracking.TrackedRun, fingerprint: str, outcomes: dict[str, Outcome]) -> None:
    claims = {
        claim: {"found": _line(outcome), **({} if isinstance(outcome, str) else {"values": outcome.values})}
        for claim, outcome in outcomes.items()
    }
    record = {"fingerprint": fingerprint, "samples": spec.samples, "seed": spec.seed, "claims": claims}
    text = json.dumps(_finite(record), indent=2).encode()
    run.artifact(STUDY_FILE, text)
    outputs.check_owner(spec.out, fingerprint)
    files.write_bytes(files.join(spec.out, STUDY_FILE), text)


def _line(outcome: Outcome) -> str:
    return f"left out: {outcome}" if isinstance(outcome, str) else outcome.text


def _log_table(lines: dict[str, str]) -> dict[str, str]:
    """Log one line per claim; returns ``lines``."""
    width = max(map(len, lines))
    log.info("\n".join(f"{claim.ljust(width)}  {line}" for claim, line in lines.items()))
    return lines


def _finite(value: Any) -> Any:
    """A copy for JSON, with None instead of NaN and infinity."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stability(inputs: Inputs) -> Outcome:
    if not inputs.students:
        return "no `students`"
    found, left_out = {}, []
    for student in inputs.student_subjects():
        w, steps = student.config.guidance, student.sampling.steps
        assert w is not None
        teacher = inputs.teacher_subject(w, steps)
        if teacher.sampling.steps % steps:
            reason = f"its {steps} steps do not divide the teacher's {teacher.sampling.steps}"
            left_out.append(f"{student.name}: left out, because {reason}")
        else:
            found[student.name] = stability(teacher, student)
    if not found:
        return "; ".join(left_out) or "no step count of `steps` divides the store's knots"
    lines: list[str] = []
    metrics: dict[str, float] = {}
    for name, knots in found.items():
        beyond = [f"{knot.t:g}" for knot in knots if not knot.holds]
        verdict = f"violated at t = {', '.join(beyond)}" if beyond else "holds at every knot"
        worst = max(knot.error for knot in knots)
        lines.append(f"{name}: error at most {worst:.4f}, bound at the image {knots[-1].bound:.4f}, bound {verdict}")
        metrics |= {f"largest_error/{name}": worst, f"image_error/{name}": knots[-1].error}
        metrics |= {f"image_bound/{name}": knots[-1].bound, f"knots_beyond/{name}": float(len(beyond))}
    values = {name: [{**knot._asdict(), "holds": knot.holds} for knot in knots] for name, knots in found.items()}
    return ClaimResult("; ".join([*lines, *left_out]), values, metrics, study_plots.stability(found))


def _speed(inputs: Inputs) -> Outcome:
    limit = inputs.teacher.path.build().speed_limit()
    if not math.isfinite(limit):
        return "the teacher's path has no speed limit"
    # Guided velocities have another limit, so students with guidance in their weights are not measured.
    teacher, *rival = inputs.teachers()
    found = {s.name: speeds(s, limit) for s in (teacher, *inputs.student_subjects(0.0), *rival)}
    lines = [f"{name} at most {s.largest:.2f}, {100 * s.share_beyond:.2g} % beyond" for name, s in found.items()]
    values = {
        name: {"largest": s.largest, "share_beyond": s.share_beyond, "density": s.density()[1]}
        for name, s in found.items()
    }
    metrics = {f"largest/{name}": s.largest for name, s in found.items()}
    metrics |= {f"share_beyond/{name}": s.share_beyond for name, s in found.items()}
    text = f"limit {limit:g} of |u| per coordinate: {'; '.join(lines)}"
    return ClaimResult(text, {"limit": limit, "models": values}, metrics, study_plots.speed(found, limit))


def _solver(inputs: Inputs) -> Outcome:
    found = {s.name: list(quality_by_solver(s, inputs.spaces, inputs.train)) for s in inputs.teachers()}
    space = inputs.spaces[-1].name
    lines: list[str] = []
    metrics: dict[str, float] = {}
    for name, points in found.items():
        for method in STEPPERS:
            distances = [f"{point.distances[space]:.4f}" for point in points if point.method == method]
            lines.append(f"{name} {method} {' '.join(distances)}")
        for point in points:
            for space_name, distance in point.distances.items():
                metrics[f"frechet_distance_{space_name}_{point.method}_{point.steps}/{name}"] = distance
    values = {name: [point._asdict() for point in points] for name, points in found.items()}
    count, floor = inputs.floor
    real = f"{count:,} held-out images {floor[space]:.4f}"
    text = f"FD {space} in {', '.join(map(str, STEPS))} steps: {'; '.join(lines)}; {real}"
    picture = study_plots.solver(found, count, floor)
    return ClaimResult(text, {"held_out": {"count": count, "distances": floor}, **values}, metrics, picture)


def _guidance(inputs: Inputs) -> Outcome:
    if reason := guidance_problem(inputs.teacher):
        return reason
    classifier = next((space for space in inputs.spaces if isinstance(space.network, Classifier)), None)
    found = list(effect_of_guidance(inputs.teacher_subject(), classifier))
    first, last = found[0], found[-1]
    parts = [
        f"kinetic energy {first.kinetic_energy:.4g} to {last.kinetic_energy:.4g}",
        f"out of range {first.out_of_range:.2%} to {last.out_of_range:.2%}",
    ]
    if first.agreement is not None and last.agreement is not None:
        parts.append(f"label agreement {first.agreement:.2%} to {last.agreement:.2%}")
    metrics: dict[str, float] = {}
    for point in found:
        measured = point._asdict()
        w = measured.pop("guidance")
        metrics |= {f"{name}/w={w:g}": value for name, value in measured.items() if value is not None}
    text = f"w = {first.guidance:g} to {last.guidance:g}: {', '.join(parts)}"
    return ClaimResult(text, {"teacher": [p._asdict() for p in found]}, metrics, study_plots.guidance(found))


def _memorisation(inputs: Inputs) -> Outcome:
    if inputs.store is None:
        return "no `store`"
    identity, w = inputs.store.identity, min(inputs.store.guidance)
    if identity.source == "forward":
        return "a forward store has only the energies of single intervals"
    last = knot_column(identity.knots, identity.knots)
    rows = inputs.store.first(inputs.spec.samples, w, [LABEL, KINETIC_ENERGY, last])
    pixels = inputs.spaces[0]
    samples = pixels(delivered(rows[last].float()))
    parts = (pixels(part) for part in images_in_parts(inputs.data))
    distance = torch.stack([nearest_distances(samples, part) for part in parts]).amin(0)
    found = energy_and_nearness(rows[KINETIC_ENERGY], distance, rows[LABEL])
    text = (
        f"w = {w:g}, {len(distance):,} trajectories, energy against distance to the nearest training image: Spearman "
        f"{found.correlation:+.3f} (p = {found.p_value:.1g}), within classes {found.within_classes:+.3f}; distance of "
        f"the 5 % with the most energy: {found.energetic_ratio:.3f} of the mean"
    )
    metrics = {name: float(value) for name, value in found._asdict().items()}
    picture = study_plots.memorisation(rows[KINETIC_ENERGY], distance, rows[LABEL], found)
    return ClaimResult(text, {"guidance": w, **found._asdict()}, metrics, picture)


def _marginals(inputs: Inputs) -> Outcome:
    if inputs.store is None:
        return "no `store`"
    identity, w = inputs.store.identity, min(inputs.store.guidance)
    if identity.source == "forward":
        return "the states of a forward store are noised data already"
    if w != 0:
        return "the store has no trajectories without guidance"
    path, generator = inputs.teacher.path.build(), torch.Generator().manual_seed(inputs.spec.seed)
    found = []
    times = knot_times(identity.knots, identity.knot_grid).tolist()
    for t, name in zip(times, identity.knot_columns, strict=True):
        states = inputs.store.first(inputs.spec.samples, w, [name])[name]
        found.append(marginal(states, t, path, inputs.data, generator))
    image, worst = found[-1], max(found, key=lambda each: each.distance / each.floor)
    text = (
        f"w = {w:g}: squared sliced W2 {image.distance:.5f} at the image, with a floor of {image.floor:.5f}; "
        f"the largest ratio to the floor is {worst.distance / worst.floor:.1f}, at t = {worst.t:g}"
    )
    metrics = {"image_distance": image.distance, "image_floor": image.floor}
    metrics |= {f"distance/t={each.t:g}": each.distance for each in found}
    values = {"guidance": w, "knots": [each._asdict() for each in found]}
    return ClaimResult(text, values, metrics, study_plots.marginals(found))


def _plane(inputs: Inputs) -> Outcome:
    if inputs.teacher.sample_shape != (2,):
        return "the samples are not points of the plane"
    # AB-2 evaluates the network once per step, so every evaluated state is on the trajectory.
    subjects = [replace(subject, sampling=subject.sampling._replace(solver="ab2")) for subject in inputs.teachers()]
    found = {subject.name: travel(subject) for subject in subjects}
    train = torch.cat(list(images_in_parts(inputs.data)))
    lines, values = [], {}
    metrics: dict[str, float] = {}
    for name, travelled in found.items():
        mean, largest = travelled.speed.mean(1), travelled.speed.amax(1)
        measured = {"sliced_wasserstein": distance_to(train, travelled.samples), "fastest": largest.max().item()}
        values[name] = {**measured, "t": travelled.t.tolist(), "mean": mean.tolist(), "largest": largest.tolist()}
        metrics |= {f"{measure}/{name}": value for measure, value in measured.items()}
        lines.append(
            f"{name}: squared sliced W2 {measured['sliced_wasserstein']:.5f}, fastest {measured['fastest']:.2f}"
        )
    return ClaimResult("; ".join(lines), values, metrics, study_plots.plane(train, found))


MEASURES: dict[str, Callable[[Inputs], Outcome]] = {
    "stability": _stability,
    "speed": _speed,
    "solver": _solver,
    "guidance": _guidance,
    "memorisation": _memorisation,
    "marginals": _marginals,
    "plane": _plane,
}
"""The function that measures each claim of ``StudySpec.claims``."""
