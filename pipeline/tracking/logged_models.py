"""Students and teachers as MLflow logged models, which can be loaded, served, and registered under a name.

The artifact of a logged model contains the model folder and the code that loads it, but no pickles:

MLmodel               signature, fingerprints, store and teacher
student_pyfunc.py     the code that MLflow runs
code/kac/             the package that this code imports, so that no other copy of this project is needed
artifacts/model/      the model folder: config.json and the weights as safetensors
artifacts/model/autoencoder/  a copy of the autoencoder, for a model in latents
input_example.json, serving_input_example.json, requirements.txt, ...

All calls go through clients of the run's own server. Unlike ``mlflow.pyfunc.log_model``, they are thread-safe and
change neither the process's tracking URI nor its active run.
"""

import json
import logging
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kac
from kac.conditioning import known_classes
from kac.data.autoencoder import FILES as AUTOENCODER_FILES
from kac.model import CONFIG_FILE, ModelConfig, image_shape, load_config
from kac.networks import outline_network
from kac.sampling import TEACHER_STEPS
from kac.util import files
from kac.util.errors import DistillKacError, one_line, without_keys
from kac.util.log import log
from pipeline import store
from pipeline.config import DistillSpec
from pipeline.tracking.runs import find_runs
from pipeline.tracking.server import client_of, tracking_uri
from pipeline.tracking.tracked_run import TrackedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

MODEL_FOLDER = "artifacts/model"
CODE_FILE = Path(__file__).with_name("student_pyfunc.py")
TAG = "distillkac."
MODEL_ID_TAG = f"{TAG}model_id"
"""The run's tag that contains the id of its logged model."""

VERSIONS_TAG = "mlflow.modelVersions"
"""The logged model's tag that lists its registered versions. MLflow's pages read this tag."""

REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "pydantic", "safetensors", "fsspec", "botocore")
"""The packages that ``kac`` needs for sampling and MLflow needs for serving."""

_save_lock = threading.Lock()
"""Serialises MLflow's ``save_model``, which leaves a fake module ``dbutils`` behind if two threads run it at once."""


def log_finished(run: TrackedRun, spec: DistillSpec, config: ModelConfig) -> None:
    """Log a trained student to its run, and register it if ``spec.register`` is set.

    If MLflow fails, only log a warning, because the student is complete on disk.
    """
    if not run.tracking_uri:
        return
    run.flush()  # the logged model copies the run's parameters and metrics
    try:
        manifest = store.read_manifest(spec.store)
        teacher = spec.teacher or (manifest.teacher if manifest else "")
        model = log_model(run, spec.out, config, {"store": spec.store, "teacher": teacher})
        if spec.register:
            register(run, spec.register, model=model)
    except Exception as error:  # noqa: BLE001 - MLflow, its server and its disk raise errors of any type
        log.warning(
            f"distill: warning: {spec.out} is complete, but MLflow ({without_keys(run.tracking_uri)}) did not store it "
            f"as a model: {one_line(error)}"
        )


def log_model(run: TrackedRun, folder: str, config: ModelConfig, links: dict[str, str]) -> "LoggedModel":
    """Log the model in ``folder`` to its run, and return the logged model. A model is logged only once.

    Args:
        run: the run that made the model.
        folder: model folder, a path or s3:// URI.
        config: the model's config.
        links: further tags, such as the paths of a student's store and teacher.

    Raises:
        MlflowException: the server refuses the model.
    """
    if existing := model_of_run(run, config.weights_sha256):
        return existing
    client = client_of(run.tracking_uri)
    info = client.get_run(run.run_id)
    facts = {
        "stage": "teach",
        "fingerprint": config.fingerprint,
        "weights_sha256": config.weights_sha256,
        "path": folder,
        **links,
    }
    name = "teacher"
    if config.kind == "student":
        name = "student-any-steps" if config.is_any_step else f"student-{config.steps}-steps"
        hashes = {"store_fingerprint": str(config.store_fingerprint), "teacher_sha256": str(config.teacher_sha256)}
        facts = {**facts, **hashes, "stage": "distill"}
    created = client.create_logged_model(
        info.info.experiment_id,
        name=name,
        source_run_id=run.run_id,
        tags={f"{TAG}{name}": value for name, value in facts.items()},
        params=dict(info.data.params),
        model_type=config.kind,
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "model")
            _write(path, folder, config, created, facts)
            client.log_model_artifacts(created.model_id, str(path))
    except BaseException:
        with suppress(Exception):
            client.finalize_logged_model(created.model_id, "FAILED")
        raise
    client.finalize_logged_model(created.model_id, "READY")
    _link(client, info, created.model_id)
    return created


def register(run: TrackedRun, name: str, alias: str | None = None, model: "LoggedModel | None" = None) -> str:
    """Register a run's ``model`` (default: its newest) as the newest version of the model ``name``; return the version.

    A model that already has a version under this name keeps that version. ``alias`` makes ``models:/NAME@ALIAS``
    refer to the version.

    Raises:
        DistillKacError: the run has no logged model, or MLflow refuses the name or the alias, or does not answer.
    """
    from mlflow.exceptions import MlflowException

    with _mlflow_errors(run.tracking_uri):
        model = model or model_of_run(run)
        if model is None:
            raise DistillKacError(
                f"The MLflow run {run.run_id} has no logged model to register. Remove the model and train it again."
            )
        client = client_of(run.tracking_uri)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        quoted = name.replace("'", "''")
        versions = client.search_model_versions(f"name = '{quoted}'")
        number = next((str(other.version) for other in versions if other.source == model.artifact_location), None)
        number = number or _new_version(client, name, model)
        if alias:
            client.set_registered_model_alias(name, alias, number)
        return number


def register_folder(folder: str, name: str) -> str:
    """Register the student in a folder. If the student's MLflow run has no logged model, log the student first.

    Raises:
        DistillKacError: MLflow has no run for this student, or ``register`` fails.
    """
    uri, config = tracking_uri(folder), load_config(folder)
    runs = find_runs(config.fingerprint, "distill", uri)
    if not runs:
        raise DistillKacError(
            f"{folder}: MLflow ({without_keys(uri)}) has no run for this student, or does not answer. Set "
            "MLFLOW_TRACKING_URI to the server that recorded its training."
        )
    with _mlflow_errors(uri):
        params = client_of(uri).get_run(runs[0].run_id).data.params
        links = {name: params[name] for name in ("store", "teacher") if name in params}
        return register(runs[0], name, model=log_model(runs[0], folder, config, links))


def model_of_run(run: TrackedRun, weights_sha256: str = "") -> "LoggedModel | None":
    """The newest complete logged model of a run, or None. ``weights_sha256`` limits the search to this hash."""
    client = client_of(run.tracking_uri)
    query = f"source_run_id = '{run.run_id}'"
    if weights_sha256:
        query += f" and tags.`{TAG}weights_sha256` = '{weights_sha256}'"
    models = client.search_logged_models([client.get_run(run.run_id).info.experiment_id], query)
    return next((model for model in models if str(model.status) == "READY"), None)


@contextmanager
def _mlflow_errors(uri: str) -> Iterator[None]:
    """Turn errors of MLflow into a ``DistillKacError`` that names the server."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise DistillKacError(
            f"MLflow ({without_keys(uri)}) failed to register the model: {one_line(error).rstrip('.')}."
        ) from error


def _link(client: "MlflowClient", info: Any, model_id: str) -> None:
    """Link the model to its run, and copy the run's last metrics, which MLflow uses to compare models."""
    from mlflow.entities import LoggedModelOutput, Metric, RunTag

    # The copies keep the original times and steps. Otherwise, the server would add new points to the run.
    run_id = info.info.run_id
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    metrics = [
        Metric(metric.key, metric.value, metric.timestamp, metric.step, model_id=model_id, run_id=run_id)
        for metric in info.data._metric_objs
        if not metric.key.startswith("system/")
    ]
    client.log_batch(run_id, metrics=metrics, tags=[RunTag(MODEL_ID_TAG, model_id)])


def _new_version(client: "MlflowClient", name: str, model: "LoggedModel") -> str:
    tags = {key: value for key, value in model.tags.items() if key.startswith(TAG)}
    # Pass the artifact's folder as the source, because MLflow would look up models:/ID on the process's own server.
    created = client.create_model_version(
        name, model.artifact_location, run_id=model.source_run_id, tags=tags, model_id=model.model_id
    )
    # The model's page in MLflow reads this tag. A tracking server sets the tag itself, but a database does not.
    versions = json.loads(client.get_logged_model(model.model_id).tags.get(VERSIONS_TAG, "[]"))
    if not any((other["name"], str(other["version"])) == (name, str(created.version)) for other in versions):
        versions.append({"name": name, "version": created.version})
        client.set_logged_model_tags(model.model_id, {VERSIONS_TAG: json.dumps(versions)})
    return str(created.version)


def _write(path: Path, folder: str, config: ModelConfig, created: "LoggedModel", facts: dict[str, str]) -> None:
    """Write the artifact of a logged model into the new folder ``path``."""
    import mlflow.pyfunc
    import numpy as np
    import pandas
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    names = {"class_names": list(config.class_names)} if config.class_names else {}
    model = Model(
        artifact_path=created.artifact_location,
        run_id=created.source_run_id,
        model_uuid=created.model_id,
        model_id=created.model_id,
        metadata={**facts, **names},
    )
    params = [
        ParamSpec("seed", "long", 0),
        ParamSpec("steps", "long", config.steps or TEACHER_STEPS),
        ParamSpec("guidance", "double", config.guidance or 0.0),
    ]
    known = known_classes(config)
    labels = [*dict.fromkeys((*known[:1], *known[-1:])), -1]  # the first class, the last class, and any class
    autoencoder = config.data.autoencoder
    is_diffusers = outline_network(config.network, config.sample_shape, config.num_classes).diffusers_name
    packages = (*REQUIREMENTS, "diffusers") if is_diffusers or autoencoder else REQUIREMENTS
    with _save_lock, _quiet():
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(CODE_FILE),
            code_paths=[str(Path(kac.__file__).parent)],
            signature=ModelSignature(
                inputs=Schema([ColSpec("long", "label")]),
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *image_shape(config)))]),
                params=ParamSchema(params),
            ),
            input_example=(pandas.DataFrame({"label": labels}), {"seed": 0}),
            # versions without local suffixes such as +cu128
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in packages],
            mlflow_model=model,
        )
    for file in Path(path, "code").rglob("*"):
        if file.is_file() and file.suffix != ".py":
            file.unlink()
    copied = {name: files.join(folder, name) for name in files.list_sizes(folder)}
    if autoencoder:
        copied |= {f"autoencoder/{name}": files.join(autoencoder, name) for name in AUTOENCODER_FILES}
    for name, source in copied.items():
        if name.endswith(".safetensors") or Path(name).name == CONFIG_FILE:
            copy = path / MODEL_FOLDER / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(files.read_bytes(source))
    # If MLflow copied the artifact, it would show a progress bar and record the source's temporary path.
    flavor = model.flavors[mlflow.pyfunc.FLAVOR_NAME]
    flavor["artifacts"] = {"model": {"path": MODEL_FOLDER, "uri": folder}}
    flavor["model_code_path"] = CODE_FILE.name
    model.model_size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    model.save(str(path / "MLmodel"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide MLflow's log lines below the level of warnings."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
