"""MLflow: one experiment, one run a stage, the chain teacher -> store -> student -> evaluation by fingerprint tags."""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kac.metrics import Metric
from kac.options import flatten
from pipeline.cluster import in_job_copy
from pipeline.config import Spec

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "distillkac"

METRICS: dict[str, Metric] = {}
"""Every metric in MLflow by its name; ``declare`` adds them where they are computed."""

PART_PREFIX = "loss/"
"""``loss/<part>``: the parts of a loss, which need no declaration."""


def declare(*metrics: Metric) -> None:
    """Add metrics to the table."""
    METRICS.update({metric.name: metric for metric in metrics})


STAGE_TAG, FINGERPRINT_TAG, INPUT_TAG = "distillkac.stage", "distillkac.fingerprint", "distillkac.input."


@dataclass(frozen=True)
class TrackedRun:
    """A run of MLflow that any process can write to: only text, so that it travels to workers."""

    tracking_uri: str
    run_id: str

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log metrics of ``METRICS``, which may have prefixes (``steps_4/nfe``), and parts of the loss.

        Raises:
            KeyError: another name.
        """
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        declared = {name for name in values if name.rsplit("/", 1)[-1] in METRICS}
        unknown = {name for name in values if not name.startswith(PART_PREFIX)} - declared
        if unknown:
            raise KeyError(f"not in METRICS: {sorted(unknown)}")
        now = get_current_time_millis()
        self._client().log_batch(self.run_id, [Metric(k, float(v), now, step) for k, v in values.items()])

    def tags(self, values: dict[str, str]) -> None:
        """Set tags."""
        for name, value in values.items():
            self._client().set_tag(self.run_id, name, value)

    def artifact(self, name: str, data: bytes) -> None:
        """Attach a file, whose name may have folders."""
        below, _, bare = name.rpartition("/")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / bare
            path.write_bytes(data)
            self._client().log_artifact(self.run_id, str(path), below or None)

    def image(self, name: str, png: bytes, step: int) -> None:
        """Add a picture to the series ``name``."""
        from PIL import Image

        self._client().log_image(self.run_id, Image.open(io.BytesIO(png)), key=name, step=step, synchronous=True)

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters beside the spec's own."""
        _log_values(self._client(), self.run_id, values)

    def _client(self) -> "MlflowClient":
        from mlflow import MlflowClient

        return MlflowClient(self.tracking_uri)


def tracking_uri(beside: str) -> str:
    """MLFLOW_TRACKING_URI, or ``mlflow.db`` in the current directory.

    A submitted job's directory does not outlive it: its database lies beside the stage's output ``beside``.
    """
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    if configured:
        return configured
    folder = os.getcwd()
    if in_job_copy() and "://" not in beside:
        folder = os.path.dirname(os.path.abspath(beside))
    return f"sqlite:///{os.path.join(folder, 'mlflow.db')}"


def find_runs(fingerprint: str, stage: str | None = None, uri: str | None = None) -> list[TrackedRun]:
    """The runs of what has this fingerprint, newest first; none for an empty one, which names nothing.

    Args:
        uri: where to look; default: the current server.
    """
    # For the merge: a minimal version, which the reworked tracking replaces.
    from mlflow import MlflowClient

    uri = uri or tracking_uri(os.getcwd())
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if not fingerprint or experiment is None:
        return []
    wanted = {FINGERPRINT_TAG: fingerprint, **({STAGE_TAG: stage} if stage else {})}
    query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in wanted.items())
    found = client.search_runs([experiment.experiment_id], query, order_by=["attributes.start_time DESC"])
    return [TrackedRun(uri, run.info.run_id) for run in found]


@contextmanager
def start_run(
    *,
    spec: Spec,
    fingerprint: str,
    inputs: dict[str, str],
    output: str,
    parent: TrackedRun | None = None,
    name: str | None = None,
    stage: str | None = None,
) -> Iterator[TrackedRun]:
    """A run of the spec's stage, ended as FINISHED, or as FAILED if the block raises.

    Args:
        fingerprint: of what the stage makes. inputs: fingerprints of what it is made from, by stage.
        output: where the stage writes. parent: the run to nest this one under.
        name: what the run is called in MLflow; default: the stage. stage: another than the spec's.
    """
    from mlflow import MlflowClient

    uri = parent.tracking_uri if parent else tracking_uri(output)
    client = MlflowClient(uri)
    stage = stage or spec.stage
    tags = {
        "mlflow.runName": name or stage,
        STAGE_TAG: stage,
        FINGERPRINT_TAG: fingerprint,
        **{f"{INPUT_TAG}{made_by}": value for made_by, value in inputs.items()},
    }
    if parent:
        tags["mlflow.parentRunId"] = parent.run_id
    created = client.create_run(_experiment(client, uri), tags=tags)
    run = TrackedRun(uri, created.info.run_id)
    _log_params(client, run.run_id, spec)
    try:
        yield run
    except BaseException:
        client.set_terminated(run.run_id, "FAILED")
        raise
    client.set_terminated(run.run_id, "FINISHED")


def _experiment(client: "MlflowClient", uri: str) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found:
        return str(found.experiment_id)
    # A local database names the folder of its artifacts itself, or it would be that of whichever process came first.
    path = uri.removeprefix("sqlite:///")
    location = Path(path).parent.joinpath("mlartifacts").as_uri() if path != uri else None
    return str(client.create_experiment(EXPERIMENT, artifact_location=location))


def _log_params(client: "MlflowClient", run_id: str, spec: Spec) -> None:
    _log_values(client, run_id, flatten(spec.model_dump(mode="json")))


def _log_values(client: "MlflowClient", run_id: str, values: dict[str, Any]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(name, str(value)[:500]) for name, value in values.items()])
