"""Students in MLflow: each is a logged model of its run, which anybody can load, serve and register by name.

The artifact of a model is its folder and the code that reads it, nothing pickled:

MLmodel               signature, store and teacher, what to load
student_pyfunc.py     the code that MLflow runs
code/kac/             what that code imports: a model needs no other copy of this project
artifacts/model/      the model folder: config.json and the weights as safetensors
input_example.json, serving_input_example.json, requirements.txt, ...

Everything goes through clients of the run's own server: the tracking URI and the active run of the process stay as
they are, and many threads may do it at once.
"""

import json
import logging
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kac
from kac.conditioning import known_classes
from kac.model import CONFIG_FILE, ModelConfig, load_config
from kac.networks import outline_network
from kac.util import files
from kac.util.errors import DistillKacError, one_line
from kac.util.log import log
from pipeline import store, tracking
from pipeline.config.specs import DistillSpec
from pipeline.tracking import TrackedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_FOLDER = "artifacts/model"
CODE_FILE = Path(__file__).with_name("student_pyfunc.py")
TAG = "distillkac."
MODEL_ID_TAG = f"{TAG}model_id"
"""On a run: the model that was logged to it."""

VERSIONS_TAG = "mlflow.modelVersions"
"""On a logged model: where MLflow looks for its registered versions."""

REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "pydantic", "safetensors", "fsspec", "botocore")
"""What ``kac`` needs to sample, and MLflow to serve."""

_one_at_a_time = threading.Lock()
"""MLflow runs a model's code with a module ``dbutils`` of its own making, which two threads at once leave behind."""


@dataclass(frozen=True)
class LoggedModel:
    """A model in MLflow: only text, as ``TrackedRun``."""

    tracking_uri: str
    model_id: str

    @property
    def uri(self) -> str:
        """What ``mlflow.pyfunc.load_model`` and ``mlflow models serve`` take."""
        return f"models:/{self.model_id}"


def log_finished(run: TrackedRun, spec: DistillSpec, config: ModelConfig) -> LoggedModel | None:
    """Log the student that ``spec`` has made to its run, and register it if asked for.

    The student is on disk already: whatever the server refuses costs a warning, and the result is None.
    """
    run.flush()  # the model takes over what the run has logged
    try:
        model = log_student(run, spec.out, config, links_of(spec))
        if spec.register:
            register(model, spec.register)
    except Exception as error:  # noqa: BLE001 - whatever MLflow, its server or its disk raise
        log.warning(
            f"distill: warning: {spec.out} is complete, but MLflow "
            f"({tracking.without_password(run.tracking_uri)}) did not take it as a model: {_told(error)}"
        )
        return None
    return model


def links_of(spec: DistillSpec) -> dict[str, str]:
    """Where a student's store and teacher lie."""
    manifest = store.read_manifest(spec.store)
    teacher = spec.teacher or (manifest.teacher if manifest else "")
    return {"store": spec.store, "teacher": teacher}


def log_student(run: TrackedRun, folder: str, config: ModelConfig, links: dict[str, str]) -> LoggedModel:
    """The student in ``folder`` as a model of its run; one that is there already is returned as it is.

    Args:
        folder: model folder, a path or s3:// URI.
        links: more to know about it, such as the folders of its store and teacher.

    Raises:
        MlflowException: the server does not take it.
    """
    client = _client(run.tracking_uri)
    info = client.get_run(run.run_id)
    known = _find(client, info.info.experiment_id, config, info.info.run_id)
    if known:
        return LoggedModel(run.tracking_uri, known)
    facts = {
        "stage": "distill",
        "fingerprint": config.fingerprint,
        "weights_sha256": config.weights_sha256,
        "store_fingerprint": str(config.store_fingerprint),
        "teacher_sha256": str(config.teacher_sha256),
        "path": folder,
        **links,
    }
    created = client.create_logged_model(
        info.info.experiment_id,
        name="student-any-steps" if config.is_any_step else f"student-{config.steps}-steps",
        source_run_id=run.run_id,
        tags={f"{TAG}{name}": value for name, value in facts.items()},
        params=dict(info.data.params),
        model_type="student",
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "model")
            _write(path, folder, config, created, facts, run.run_id)
            client.log_model_artifacts(created.model_id, str(path))
    except BaseException:
        with suppress(Exception):
            client.finalize_logged_model(created.model_id, "FAILED")
        raise
    client.finalize_logged_model(created.model_id, "READY")
    _link(client, info, created.model_id)
    return LoggedModel(run.tracking_uri, created.model_id)


def register(run_or_model: TrackedRun | LoggedModel, name: str, alias: str | None = None) -> str:
    """Make a logged student the newest version of the registered model ``name``; returns the version.

    A student that is a version of it already stays that version.

    Args:
        run_or_model: a student's run, or its logged model.
        alias: the version can be had as ``models:/NAME@ALIAS`` from now on.

    Raises:
        DistillKacError: no model was logged to the run, or MLflow refuses the name or alias, or does not answer.
    """
    with _naming(run_or_model.tracking_uri):
        return _register(_client(run_or_model.tracking_uri), run_or_model, name, alias)


def _register(client: "MlflowClient", run_or_model: TrackedRun | LoggedModel, name: str, alias: str | None) -> str:
    from mlflow.exceptions import MlflowException

    model = run_or_model if isinstance(run_or_model, LoggedModel) else model_of_run(run_or_model)
    if model is None:
        raise DistillKacError(
            f"MLflow run {getattr(run_or_model, 'run_id', '')}: expected a logged model to register, found none: "
            "remove the student and distill it again"
        )
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    logged = client.get_logged_model(model.model_id)
    versions = client.search_model_versions(f"name = '{_quoted(name)}'")
    number = next((str(other.version) for other in versions if other.source == logged.artifact_location), None)
    number = number or _new_version(client, name, logged)
    if alias:
        client.set_registered_model_alias(name, alias, number)
    return number


def register_folder(folder: str, name: str) -> str:
    """Register the student in a folder, by its fingerprint; a student that no server took yet is logged first.

    Raises:
        DistillKacError: MLflow knows no run of it, or as ``register``.
    """
    uri = tracking.tracking_uri(folder)
    with _naming(uri):
        return register(_model_of_folder(folder, uri), name)


def _model_of_folder(folder: str, uri: str) -> LoggedModel:
    client, config = _client(uri), load_config(folder)
    experiment = client.get_experiment_by_name(tracking.experiment_name())
    query = f"tags.`{tracking.FINGERPRINT_TAG}` = '{config.fingerprint}' and tags.`{tracking.STAGE_TAG}` = 'distill'"
    runs = client.search_runs([experiment.experiment_id], query, max_results=1) if experiment else []
    if not runs:
        raise DistillKacError(
            f"{folder}: expected a run of this student in MLflow ({tracking.without_password(uri)}), found none: set "
            "MLFLOW_TRACKING_URI to the server that it was trained with"
        )
    run, links = TrackedRun(uri, runs[0].info.run_id), runs[0].data.params
    return log_student(run, folder, config, {name: links[name] for name in ("store", "teacher") if name in links})


def model_of_run(run: TrackedRun) -> LoggedModel | None:
    """The student that was logged to a run, if there is one."""
    found = _client(run.tracking_uri).get_run(run.run_id).data.tags.get(MODEL_ID_TAG)
    return LoggedModel(run.tracking_uri, found) if found else None


@contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Raise ``DistillKacError`` for what MLflow raises, in one line that says where."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        where = tracking.without_password(uri)
        raise DistillKacError(f"MLflow ({where}): expected it to take the model, found: {_told(error)}") from error


def _told(error: Exception) -> str:
    return tracking.without_password(one_line(error))


def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _find(client: "MlflowClient", experiment_id: str, config: ModelConfig, run_id: str) -> str | None:
    """The model of these weights that was logged to the run, and is complete."""
    found = client.search_logged_models(
        [experiment_id], f"source_run_id = '{run_id}' and tags.`{TAG}weights_sha256` = '{config.weights_sha256}'"
    )
    return next((str(model.model_id) for model in found if str(model.status) == "READY"), None)


def _link(client: "MlflowClient", info: Any, model_id: str) -> None:
    """Name the model in its run, and give it the run's last metrics: MLflow compares models by their own."""
    from mlflow.entities import LoggedModelOutput, Metric, RunTag

    # With their times and steps, so that the server takes them for the run's own and not for new ones.
    run_id = info.info.run_id
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    metrics = [
        Metric(metric.key, metric.value, metric.timestamp, metric.step, model_id=model_id, run_id=run_id)
        for metric in info.data._metric_objs
        if not metric.key.startswith("system/")
    ]
    client.log_batch(run_id, metrics=metrics, tags=[RunTag(MODEL_ID_TAG, model_id)])


def _new_version(client: "MlflowClient", name: str, logged: Any) -> str:
    tags = {key: value for key, value in logged.tags.items() if key.startswith(TAG)}
    # By the folder of the artifact: MLflow looks a source models:/ID up in the tracking URI of the process.
    created = client.create_model_version(
        name, logged.artifact_location, run_id=logged.source_run_id, tags=tags, model_id=logged.model_id
    )
    # A server does this itself, a database does not: the model's page names its versions.
    known = json.loads(client.get_logged_model(logged.model_id).tags.get(VERSIONS_TAG, "[]"))
    mine = {"name": name, "version": created.version}
    if not any(str(other["version"]) == str(created.version) and other["name"] == name for other in known):
        client.set_logged_model_tags(logged.model_id, {VERSIONS_TAG: json.dumps([*known, mine])})
    return str(created.version)


def _quoted(name: str) -> str:
    return name.replace("'", "''")


def _write(path: Path, folder: str, config: ModelConfig, created: Any, facts: dict[str, str], run_id: str) -> None:
    """Write the artifact of a model into the new folder ``path``."""
    import mlflow.pyfunc
    from mlflow.models import Model

    model = Model(
        artifact_path=created.artifact_location,
        run_id=run_id,
        model_uuid=created.model_id,
        model_id=created.model_id,
        metadata={**facts, **({"class_names": list(config.class_names)} if config.class_names else {})},
    )
    with tempfile.TemporaryDirectory() as scratch, _quiet("mlflow.pyfunc", "mlflow.models"), _one_at_a_time:
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(CODE_FILE),
            code_paths=[str(_copy_code(Path(scratch)))],
            signature=signature(config),
            input_example=example(config),
            pip_requirements=_requirements(config),
            mlflow_model=model,
        )
    _copy_model(folder, path / MODEL_FOLDER)
    # MLflow's own copying of artifacts draws a progress bar, and records where its source was for a moment.
    flavor = model.flavors[mlflow.pyfunc.FLAVOR_NAME]
    flavor["artifacts"] = {"model": {"path": MODEL_FOLDER, "uri": folder}}
    flavor["model_code_path"] = CODE_FILE.name
    model.model_size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    model.save(str(path / "MLmodel"))


def signature(config: ModelConfig) -> Any:
    """What the model takes and gives: labels to images, by seed, steps and guidance."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    return ModelSignature(
        Schema([ColSpec(DataType.long, "label")]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, *config.sample_shape))]),
        ParamSchema(
            [
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("steps", DataType.long, config.steps),
                ParamSpec("guidance", DataType.double, config.guidance),
            ]
        ),
    )


def example(config: ModelConfig) -> tuple[Any, dict[str, int]]:
    """Images of the first and the last class, and one of any."""
    import pandas

    known = known_classes(config)
    return pandas.DataFrame({"label": [*dict.fromkeys((*known[:1], *known[-1:])), -1]}), {"seed": 0}


def _copy_model(folder: str, into: Path) -> None:
    """Copy what ``load_model`` reads of a model folder."""
    for name in files.list_sizes(folder):
        if name.endswith(".safetensors") or Path(name).name == CONFIG_FILE:
            path = into / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files.read_bytes(files.join(folder, name)))


def _copy_code(into: Path) -> Path:
    """Copy the code of ``kac``, without what else lies there; returns the copy."""
    source = Path(kac.__file__).parent
    for path in source.rglob("*.py"):
        copy = into / "kac" / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return into / "kac"


def _requirements(config: ModelConfig) -> list[str]:
    """As installed here; a build for one kind of GPU or none is the same version everywhere else."""
    network = outline_network(config.network, config.sample_shape, config.num_classes)
    names = (*REQUIREMENTS, "diffusers") if network.diffusers_name else REQUIREMENTS
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep back what this thread's calls of MLflow tell about their progress."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.WARNING

    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)
