"""Finds the models to compare: folders of models, the front of a sweep, or the models of runs in MLflow."""

import json
from typing import Any

from kac.model import CONFIG_FILE, load_config
from kac.util import files
from kac.util.errors import ArgumentError, DistillKacError
from pipeline import store, tracking
from pipeline.cluster import connection as cluster
from pipeline.config import EvaluateSpec

ANSWER_FILE = "answer.json"
"""The answer in a sweep's folder: see ``pipeline.sweep.report``."""

PATH_TAG, WEIGHTS_TAG = "distillkac.path", "distillkac.weights_sha256"
"""Tags of a run that produced a model: the folder and the weights of the model."""


def resolve(spec: EvaluateSpec) -> EvaluateSpec:
    """The spec with the folders of the teacher and the students as absolute paths.

    Raises:
        DistillKacError: a finished sweep, a run or a model is missing, or the teacher is not known.
    """
    spec = spec.model_copy(update={"out": cluster.absolute(spec.out)})
    teacher, students = spec.teacher, [cluster.absolute(path) for path in spec.students]
    if spec.from_sweep:
        answer, front = _read_front(cluster.absolute(spec.from_sweep))
        students += front
        teacher = teacher or answer.get("teacher") or _teacher_of_store(answer.get("store"))
    if spec.runs:
        teachers, students_of_runs = _models_of_runs(spec)
        students += students_of_runs
        teacher = teacher or next(iter(teachers), None) or _teacher_of_students(spec, students_of_runs)
    if teacher is None:
        raise ArgumentError("`teacher` is required, because the sweep or the runs do not name one.")
    return spec.model_copy(
        update={
            "teacher": cluster.absolute(teacher),
            "students": tuple(dict.fromkeys(students)),
            "from_sweep": None,
            "runs": (),
        }
    )


def _read_front(sweep: str) -> tuple[dict[str, Any], list[str]]:
    """The answer of a sweep, and the folders of the students on its front."""
    path = files.join(sweep, ANSWER_FILE)
    try:
        answer = json.loads(files.read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(
            f"`from_sweep` {sweep} has no {ANSWER_FILE}, so it is not a finished sweep. Finish the sweep first."
        ) from None
    except ValueError:
        raise DistillKacError(f"{path} is damaged. Run the command of the sweep again.") from None
    front = [_student_folder(folder, sweep) for folder in answer.get("front", [])]
    if not front:
        raise ArgumentError(f"`from_sweep` {sweep} has no finished trials. Finish the sweep first.")
    return answer, front


def _student_folder(folder: str, sweep: str) -> str:
    """The folder of a student; if the sweep was moved, the folder of the same name in the sweep's folder."""
    return folder if files.exists(files.join(folder, CONFIG_FILE)) else files.join(sweep, folder.rsplit("/", 1)[-1])


def _models_of_runs(spec: EvaluateSpec) -> tuple[list[str], list[str]]:
    """The folders of the teachers and of the students that the runs produced."""
    folders = [_model_of_run(tracking.tracking_uri(spec.out), run_id) for run_id in spec.runs]
    kinds = [(load_config(folder).kind, folder) for folder in folders]
    return [f for kind, f in kinds if kind == "teacher"], [f for kind, f in kinds if kind == "student"]


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
    if PATH_TAG not in tags:
        raise ArgumentError(
            f"`runs` {run_id} is a run of the stage {tags.get(tracking.STAGE_TAG, 'unknown')} without a model. Give "
            "finished runs of distill."
        )
    folder = str(tags[PATH_TAG])
    if not files.exists(files.join(folder, CONFIG_FILE)):
        raise ArgumentError(f"`runs` {run_id} wrote its model to {folder}, but {CONFIG_FILE} is missing there.")
    return folder


def _teacher_of_students(spec: EvaluateSpec, students: list[str]) -> str | None:
    """The teacher of the first student: found in MLflow by its weights, or in the manifest of the student's store."""
    from mlflow import MlflowClient

    uri = tracking.tracking_uri(spec.out)
    if not uri:
        return None
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(tracking.experiment_name())
    if not students or experiment is None:
        return None
    query = f"tags.`{WEIGHTS_TAG}` = '{load_config(students[0]).teacher_sha256}'"
    folders = [run.data.tags.get(PATH_TAG) for run in client.search_runs([experiment.experiment_id], query)]
    existing = [folder for folder in folders if folder and files.exists(files.join(folder, CONFIG_FILE))]
    runs = [client.get_run(run_id) for run_id in spec.runs]
    stores = [run.data.params.get("store") for run in runs if run.data.tags.get(PATH_TAG) == students[0]]
    return existing[0] if existing else next(iter(filter(None, map(_teacher_of_store, stores))), None)


def _teacher_of_store(path: str | None) -> str | None:
    """The folder of the teacher that a store's manifest names; None if the store or the teacher does not exist."""
    if not path:
        return None
    try:
        manifest = store.open(path).manifest
    except DistillKacError:
        return None
    teacher = manifest.teacher if manifest else None
    return teacher if teacher and files.exists(files.join(teacher, CONFIG_FILE)) else None
