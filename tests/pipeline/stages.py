"""Small runs of the stages for tests, and their records in MLflow."""

import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from kac.networks import MLPConfig
from pipeline import tracking
from pipeline.config import DistillSpec, OptimizerConfig, TeachSpec

FEW = OptimizerConfig(updates=60, batch_size=64, learning_rate=3e-3, warmup_updates=5, ema_decay=0.9)
DIVERGING = OptimizerConfig(updates=60, learning_rate=1e30, warmup_updates=0, max_gradient_norm=1e30)
SMALL = MLPConfig(width=16, depth=1)


def teach_spec(out: Path, **options: Any) -> TeachSpec:
    """Return a spec of a teacher of the moons: 60 updates in this process."""
    return TeachSpec(**{"data": "moons", "network": SMALL, "optimizer": FEW, "workers": 0, **options}, out=str(out))


def distill_spec(store: str, out: Path, **options: Any) -> DistillSpec:
    """Return a spec of a student of two steps: 60 updates in this process."""
    return DistillSpec(**{"optimizer": FEW, "workers": 0, "steps": 2, **options}, store=store, out=str(out))


def weights(path: str | Path) -> bytes:
    """Return the bytes of a model folder's weights."""
    return (Path(path) / "model.safetensors").read_bytes()


def runs_of(stage: str) -> list[Any]:
    """Return the stage's runs in this session's MLflow."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(tracking.experiment_name())
    assert experiment is not None
    query = f"tags.`{tracking.STAGE_TAG}` = '{stage}'"
    return list(client.search_runs([experiment.experiment_id], query, max_results=1000))


def run_of(stage: str, fingerprint: str) -> Any:
    """Return the stage's run with this fingerprint, preferably a finished run."""
    runs = [run for run in runs_of(stage) if run.data.tags[tracking.FINGERPRINT_TAG] == fingerprint]
    return next((run for run in runs if run.info.status == "FINISHED"), runs[0])


def metrics_of(stage: str, fingerprint: str, name: str) -> list[Any]:
    """Return the history of a metric."""
    return list(MlflowClient().get_metric_history(run_of(stage, fingerprint).info.run_id, name))


def wait_for_free_cpus(seconds: float = 20.0) -> bool:
    """Wait until Ray has no CPU in use. Return False if that takes more than ``seconds``."""
    import ray

    deadline = time.monotonic() + seconds
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
