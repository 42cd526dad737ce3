"""What is compared: models by their folders, the front of a sweep, or the models of runs in MLflow."""

import json
from typing import Any

from kac.model import CONFIG_FILE, load_config
from kac.util import files
from kac.util.errors import DistillKacError
from pipeline import store, tracking
from pipeline.cluster import connection as cluster
from pipeline.config.specs import EvaluateSpec

ANSWER_FILE = "answer.json"
"""What a sweep found, in its folder: see ``pipeline.sweep.answer``."""

PATH_TAG, WEIGHTS_TAG = "distillkac.path", "distillkac.weights_sha256"
"""Tags of a run that has made a model: its folder and its weights."""


def resolve(spec: EvaluateSpec) -> EvaluateSpec:
    """The spec with the folders of its teacher and students, as every process of the cluster understands them.

    Raises:
        DistillKacError: no finished sweep, no run or no model is where one was said to be, or nobody knows a teacher.
    """
    spec = spec.model_copy(update={"out": cluster.absolute(spec.out)})
    teacher, students = spec.teacher, [cluster.absolute(path) for path in spec.students]
    if spec.from_sweep:
        answer, front = _front(cluster.absolute(spec.from_sweep))
        students += front
        teacher = teacher or answer.get("teacher") or teacher_of_store(answer.get("store"))
    if spec.runs:
        teachers, found = _models_of_runs(spec)
        students += found
        teacher = teacher or next(iter(teachers), None) or _teacher_of_students(spec, found)
    if teacher is None:
        raise DistillKacError("`teacher`: expected the teacher's folder, since nothing here says where it is")
    return spec.model_copy(
        update={
            "teacher": cluster.absolute(teacher),
            "students": tuple(dict.fromkeys(students)),
            "from_sweep": None,
            "runs": (),
        }
    )


def _front(sweep: str) -> tuple[dict[str, Any], list[str]]:
    """What a sweep found, and the folders of the students on its front."""
    path = files.join(sweep, ANSWER_FILE)
    try:
        answer = json.loads(files.read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        raise DistillKacError(
            f"`from_sweep` {sweep}: expected the folder of a finished sweep, found no {ANSWER_FILE}: finish it first"
        ) from None
    except ValueError:
        raise DistillKacError(f"{path}: expected JSON, found a damaged file: run the sweep's command again") from None
    front = [_moved(folder, sweep) for folder in answer.get("front", [])]
    if not front:
        raise DistillKacError(f"`from_sweep` {sweep}: expected finished trials, found none in {ANSWER_FILE}")
    return answer, front


def _moved(folder: str, sweep: str) -> str:
    """A student's folder, or that of its name in the sweep's folder, which may have been moved as a whole."""
    return folder if files.exists(files.join(folder, CONFIG_FILE)) else files.join(sweep, folder.rsplit("/", 1)[-1])


def _models_of_runs(spec: EvaluateSpec) -> tuple[list[str], list[str]]:
    """The folders of the teachers and of the students that the runs have made."""
    folders = [_folder_of_run(tracking.tracking_uri(spec.out), run_id) for run_id in spec.runs]
    kinds = [(load_config(folder).kind, folder) for folder in folders]
    return [f for kind, f in kinds if kind == "teacher"], [f for kind, f in kinds if kind == "student"]


def _folder_of_run(uri: str, run_id: str) -> str:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        tags = MlflowClient(uri).get_run(run_id).data.tags
    except MlflowException as error:
        where = tracking.without_password(uri)
        if not tracking.is_refusal(error):
            raise DistillKacError(
                f"`runs` {run_id}: expected the tracking server {where} to answer, found that it does not: try again, "
                "or set MLFLOW_TRACKING_URI"
            ) from None
        raise DistillKacError(f"`runs` {run_id}: expected the id of a run in {where}, found none") from None
    if PATH_TAG not in tags:
        raise DistillKacError(
            f"`runs` {run_id}: expected a run that has made a model, found one of the stage "
            f"{tags.get(tracking.STAGE_TAG, 'unknown')} without the tag {PATH_TAG}: give finished runs of distill"
        )
    folder = str(tags[PATH_TAG])
    if not files.exists(files.join(folder, CONFIG_FILE)):
        raise DistillKacError(f"`runs` {run_id}: expected a model in {folder}, found no {CONFIG_FILE} there")
    return folder


def _teacher_of_students(spec: EvaluateSpec, students: list[str]) -> str | None:
    """The teacher of the first student: by its weights in MLflow, or as the student's store knows it."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking.tracking_uri(spec.out))
    experiment = client.get_experiment_by_name(tracking.experiment_name())
    if not students or experiment is None:
        return None
    query = f"tags.`{WEIGHTS_TAG}` = '{load_config(students[0]).teacher_sha256}'"
    folders = [run.data.tags.get(PATH_TAG) for run in client.search_runs([experiment.experiment_id], query)]
    there = [folder for folder in folders if folder and files.exists(files.join(folder, CONFIG_FILE))]
    made = [client.get_run(run_id) for run_id in spec.runs]
    stores = [run.data.params.get("store") for run in made if run.data.tags.get(PATH_TAG) == students[0]]
    return there[0] if there else next(iter(filter(None, map(teacher_of_store, stores))), None)


def teacher_of_store(path: str | None) -> str | None:
    """The folder in which a store's rollout found its teacher; None if there is no such store or no teacher left."""
    if not path:
        return None
    try:
        manifest = store.open(path).manifest
    except DistillKacError:
        return None
    teacher = manifest.teacher if manifest else None
    return teacher if teacher and files.exists(files.join(teacher, CONFIG_FILE)) else None
