"""A handle of an MLflow run, through which any process can log to the run."""

import base64
import io
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pipeline.tracking.delivery import END_SECONDS, delivery_to
from pipeline.tracking.entries import PARENT_TAG, Entry, Kind, now
from pipeline.tracking.metrics import check_declared

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARAM_LENGTH = 500
"""Maximum length of a parameter's logged value. A longer value is truncated and ends in an ellipsis."""

THUMBNAIL = 256
"""Maximum width and height, in pixels, of the small copies of pictures on MLflow's pages."""


class LoggedDataset(NamedTuple):
    """Data that a run reads: a dataset or a store."""

    name: str
    digest: str  # SHA-256 or fingerprint of the content
    path: str  # path, URI or other description of the source
    context: str = "training"


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run that any process can log to. The handle consists of two strings, so it can be sent to workers.

    Logged values wait in a file (``delivery.py``), so a failing server can neither delay logging nor make it fail. A
    run with an empty URI drops all values.
    """

    tracking_uri: str
    run_id: str

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log metrics. Raises ``KeyError`` if a metric is not declared."""
        check_declared(values)
        self._put("metrics", *({name: float(value)} for name, value in values.items()), step=step)

    def tags(self, values: dict[str, str]) -> None:
        """Set tags."""
        self._put("tags", *({name: value} for name, value in values.items()))

    def params(self, values: dict[str, Any]) -> None:
        """Log parameters. In a rerun, changed parameters become tags ``distillkac.rerun.<name>``."""
        texts = {name: str(value) for name, value in values.items()}
        cut = {name: f"{text[: PARAM_LENGTH - 1]}…" for name, text in texts.items() if len(text) > PARAM_LENGTH}
        self._put("params", *({name: cut.get(name, text)} for name, text in texts.items()))

    def artifact(self, name: str, data: bytes) -> None:
        """Attach a file. Its name may contain folders."""
        self._put("file", {"name": name, "data": base64.b64encode(data).decode()})

    def image(self, name: str, png: bytes, step: int) -> None:
        """Add a picture to the series ``name``."""
        from PIL import Image

        picture, small = Image.open(io.BytesIO(png)), io.BytesIO()
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.convert("RGB").save(small, "webp")
        # MLflow's pages find a series' pictures by file names of this form, which MLflow's own client also uses.
        path = f"images/{name.replace('/', '~')}+step+{step}+timestamp+{now()}+{uuid.uuid4()}"
        self.artifact(f"{path}.png", png)
        self.artifact(f"{path}+compressed.webp", small.getvalue())
        self.tags({"mlflow.loggedImages": "True"})

    def datasets(self, datasets: Sequence[LoggedDataset]) -> None:
        """Log the data that the run reads."""
        if datasets:
            self._put("datasets", {"datasets": [dataset._asdict() for dataset in datasets]})

    def last_step(self, name: str) -> int:
        """A metric's last step on the server; 0 if the server has no value of the metric or does not answer."""
        history = self._query(lambda client, run_id: client.get_metric_history(run_id, name), [])
        return max((int(point.step) for point in history), default=0)

    def last_metrics(self) -> dict[str, float]:
        """The last value of each metric on the server; empty if the server does not answer."""
        return dict(self._query(lambda client, run_id: client.get_run(run_id).data.metrics, {}))

    def status(self) -> str:
        """The run's status on the server: RUNNING, FINISHED, FAILED or KILLED; empty if the server does not answer."""
        return str(self._query(lambda client, run_id: client.get_run(run_id).info.status, ""))

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the run. ``start_run`` ends the runs that it starts."""
        self._put("status", {"status": status})

    def nest(self, parent: "TrackedRun") -> None:
        """Nest the run under ``parent``."""
        self.tags({PARENT_TAG: parent.run_id})

    def flush(self, seconds: float = END_SECONDS) -> bool:
        """Wait until the server has all log entries of this process, or fails. Return whether it has all entries."""
        return not self.tracking_uri or delivery_to(self.tracking_uri).flush(seconds, on_disk_is_enough=True)

    def _query(self, query: Callable[["MlflowClient", str], Any], default: Any) -> Any:
        """The server's answer, or ``default`` if the server fails, so that the work continues."""
        if not self.tracking_uri:
            return default
        sender = delivery_to(self.tracking_uri).sender
        try:
            return query(sender.connected()[0], sender.id_of(self.run_id))
        except Exception:  # noqa: BLE001 - MLflow's stores raise errors of any type
            return default

    def _put(self, kind: Kind, *contents: dict[str, Any], step: int = 0) -> None:
        if self.tracking_uri:
            time = now()
            delivery_to(self.tracking_uri).put(*(Entry(self.run_id, kind, each, time, step) for each in contents))
