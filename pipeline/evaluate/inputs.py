"""Finds the models to compare: in model folders, on a sweep's front, or in MLflow runs."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from kac.guidance import check_guidance
from kac.model import CONFIG_FILE, ModelConfig, load_config, load_teacher_config
from kac.sampling import Sampling, student_sampling, teacher_sampling
from kac.util import files
from kac.util.errors import ArgumentError, DistillKacError
from pipeline import store, tracking
from pipeline.cluster import connection as cluster
from pipeline.config import EvaluateSpec

ANSWER_FILE = "answer.json"
"""The file in a sweep's folder that names its best students: see ``pipeline.sweep.sweep_report``."""

PATH_TAG, WEIGHTS_TAG = "distillkac.path", "distillkac.weights_sha256"
"""Tags of a run that made a model: the model's folder, and the hash of its weights."""


def resolve(spec: EvaluateSpec) -> EvaluateSpec:
    """Return the spec with the absolute folder paths of the teacher and all students.

    Raises:
        DistillKacError: the sweep is not finished, a run or a model is missing, or the teacher is unknown.
    """
    spec = spec.model_copy(update={"out": cluster.absolute(spec.out)})
    teacher, students = spec.teacher, [cluster.absolute(path) for path in spec.students]
    if spec.from_sweep:
        answer = _read_answer(cluster.absolute(spec.from_sweep))
        students += answer["front"]
        teacher = teacher or answer.get("teacher") or _teacher_of_store(answer.get("store"))
    if spec.runs:
        folders = [_model_of_run(tracking.tracking_uri(spec.out), run_id) for run_id in spec.runs]
        kinds = {folder: load_config(folder).kind for folder in folders}
        students += [folder for folder in folders if kinds[folder] == "student"]
        teachers = [folder for folder in dict.fromkeys(folders) if kinds[folder] == "teacher"]
        teacher = teacher or next(iter(teachers), None)
        if others := [folder for folder in teachers if folder != cluster.absolute(str(teacher))]:
            raise ArgumentError(f"`runs` has the teacher {others[0]} besides {teacher}. Give the runs of one teacher.")
        teacher = teacher or _teacher_of_runs(spec, folders)
    if teacher is None:
        raise ArgumentError("`teacher` is required, because neither the sweep nor the runs name a teacher.")
    found = {"teacher": cluster.absolute(teacher), "students": tuple(dict.fromkeys(students))}
    return spec.model_copy(update={**found, "from_sweep": None, "runs": ()})


def _read_answer(sweep: str) -> dict[str, Any]:
    """Return a sweep's answer. If the sweep was moved, the paths of its front are changed to the new folder."""
    path = files.join(sweep, ANSWER_FILE)
    try:
        answer: dict[str, Any] = json.loads(files.read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(
            f"`from_sweep` {sweep} has no {ANSWER_FILE}, so it is not a finished sweep. Finish the sweep first."
        ) from None
    except ValueError:
        raise DistillKacError(f"{path} is damaged. Run the sweep again.") from None
    front = [f if _is_model(f) else files.join(sweep, f.rsplit("/", 1)[-1]) for f in answer.get("front", [])]
    if not front:
        raise ArgumentError(f"`from_sweep` {sweep} has no finished trials. Finish the sweep first.")
    return {**answer, "front": front}


def _is_model(folder: str) -> bool:
    return files.exists(files.join(folder, CONFIG_FILE))


def _model_of_run(uri: str, run_id: str) -> str:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        tags = MlflowClient(uri).get_run(run_id).data.tags
    except MlflowException as error:
        server = tracking.without_password(uri)
        if not tracking.is_refusal(error):
            raise DistillKacError(
                f"The tracking server {server} does not answer, so `runs` cannot be read. Try again, or set "
                "MLFLOW_TRACKING_URI."
            ) from None
        raise ArgumentError(f"`runs` {run_id} is not the id of a run in {server}.") from None
    if PATH_TAG not in tags or not _is_model(tags[PATH_TAG]):
        raise ArgumentError(
            f"`runs` {run_id}: this run of the stage {tags.get(tracking.STAGE_TAG, 'unknown')} has no model in "
            f"{tags.get(PATH_TAG, 'any folder')}. Give finished runs of distill."
        )
    return str(tags[PATH_TAG])


def _teacher_of_runs(spec: EvaluateSpec, students: list[str]) -> str | None:
    """The first student's teacher: found in MLflow by its weights, or in the manifest of the student's store."""
    from mlflow import MlflowClient

    uri = tracking.tracking_uri(spec.out)
    if not uri:  # MlflowClient would use its default address
        return None
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(tracking.experiment_name())
    if experiment is None:
        return None
    query = f"tags.`{WEIGHTS_TAG}` = '{load_config(students[0]).teacher_sha256}'"
    folders = [run.data.tags.get(PATH_TAG) for run in client.search_runs([experiment.experiment_id], query)]
    existing = (folder for folder in folders if folder and _is_model(folder))
    runs = [client.get_run(run_id) for run_id in spec.runs]
    stores = [run.data.params.get("store") for run in runs if run.data.tags.get(PATH_TAG) == students[0]]
    return next(existing, None) or next(filter(None, map(_teacher_of_store, stores)), None)


def _teacher_of_store(path: str | None) -> str | None:
    """The teacher folder named in a store's manifest; None if there is no such folder."""
    try:
        manifest = store.open(path).manifest if path else None
    except DistillKacError:
        return None
    return manifest.teacher if manifest and manifest.teacher and _is_model(manifest.teacher) else None


class Candidate(NamedTuple):
    """A model in the comparison, with its sampling."""

    name: str
    path: str
    config: ModelConfig
    guidance: float  # scale at which the model is sampled
    sampling: Sampling


def find_candidates(spec: EvaluateSpec) -> list[Candidate]:
    """The models of a resolved spec, with their sampling: teachers first, then students, both sorted by guidance.

    Raises:
        DistillKacError: a model is missing, a student has a different teacher, or the teacher cannot be guided.
    """
    assert spec.teacher is not None  # set by `resolve`
    teacher = load_teacher_config(spec.teacher)
    check_guidance(teacher, spec.guidance)
    names = unique_names(path for given in spec.students for path in student_folders(given))
    students = [student for path, name in names.items() for student in _students(spec, teacher, path, name)]
    students.sort(key=lambda student: (student.guidance, -student.sampling.steps, student.name))
    teachers = []
    for w in sorted({0.0, *spec.guidance, *(student.guidance for student in students)}):
        sampling = teacher_sampling(teacher, w, spec.solver_steps, spec.solver, spec.knot_grid, spec.time_factor)
        teachers.append(Candidate(f"teacher w={w:g}", spec.teacher, teacher, w, sampling))
    return [*teachers, *students]


def unique_names(folders: Iterable[str]) -> dict[str, str]:
    """Unique names of students, by folder: the last part of each path, or more parts if several paths end alike."""
    names = {path: path.rsplit("/", 1)[-1] for path in folders}
    for depth in itertools.count(2):
        counts = Counter(names.values())
        if max(counts.values(), default=1) == 1:
            break
        names |= {path: "/".join(path.split("/")[-depth:]) for path, name in names.items() if counts[name] > 1}
    return names


def _students(spec: EvaluateSpec, teacher: ModelConfig, path: str, base_name: str) -> list[Candidate]:
    """One candidate per evaluated step count and guidance scale of the student in a folder."""
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
    """Read the config in a folder. Raises ``DistillKacError`` unless the model is a student of this teacher."""
    config = load_config(path)
    if config.kind != "student":
        raise DistillKacError(f"{path} is a {config.kind}, not a student. Choose the folder of a student.")
    if config.teacher_sha256 != teacher.weights_sha256:
        raise DistillKacError(
            f"{path} belongs to another teacher ({str(config.teacher_sha256)[:12]}...), not to {teacher_path} "
            f"({teacher.weights_sha256[:12]}...). Give the student's own teacher."
        )
    return config


def student_folders(path: str) -> list[str]:
    """The folder of a student, or the folders of all students of a sweep."""
    if _is_model(path):
        return [path]
    names = (name.split("/") for name in files.list_sizes(path))
    folders = [files.join(path, parts[0]) for parts in names if parts[1:] == [CONFIG_FILE]]
    if not folders:
        raise DistillKacError(f"{path} is not the folder of a student or a sweep: it has no {CONFIG_FILE}.")
    return folders
