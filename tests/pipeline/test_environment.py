"""A relative address in the environment means the same file in the driver, its trials and its workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from kac.util.errors import ArgumentError
from pipeline import tracking
from pipeline.cluster import environment


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate current directory for this test, which also contains the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(environment.REGISTRY, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "absolute"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{folder}/mlflow.db"),
        ("sqlite:///./a/../mlflow.db", "sqlite:///{folder}/mlflow.db"),
        ("sqlite:///../mlflow.db", "sqlite:///{parent}/mlflow.db"),
        ("sqlite:///~/mlflow.db", "sqlite:///{folder}/home/mlflow.db"),
        ("sqlite:///with space.db?timeout=5", "sqlite:///{folder}/with space.db?timeout=5"),
        ("sqlite+pysqlite:///mlflow.db", "sqlite+pysqlite:///{folder}/mlflow.db"),
        ("sqlite:////somewhere/mlflow.db", "sqlite:////somewhere/mlflow.db"),
        ("http://tracking:5000", "http://tracking:5000"),
        ("  https://tracking/sub  ", "https://tracking/sub"),
        ("postgresql://me@host/runs", "postgresql://me@host/runs"),
        ("databricks", "databricks"),
    ],
)
def test_an_address_becomes_absolute_and_stays_the_same(
    given: str, absolute: str, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(environment.TRACKING, given)
    expected = absolute.format(folder=folder, parent=folder.parent)
    assert environment.mlflow_address() == expected
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert environment.mlflow_address() == expected == os.environ[environment.TRACKING]


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("sqlite://", "sqlite:///mlflow.db"),
        ("sqlite:///:memory:", "sqlite:///mlflow.db"),
        ("sqlite:mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite://mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite:///.", "/mlflow.db"),
        ("mlflow.db", "sqlite:///mlflow.db"),
        ("./mlruns", "mlflow migrate-filestore"),
        ("file:mlruns", "mlflow migrate-filestore"),
        ("localhost:5000", "http://localhost:5000"),
        ("127.0.0.1:5000/runs", "http://127.0.0.1:5000/runs"),
    ],
)
@pytest.mark.parametrize("variable", [environment.TRACKING, environment.REGISTRY])
def test_an_address_that_mlflow_cannot_use_is_refused(
    variable: str, given: str, advice: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(variable, given)
    with pytest.raises(ArgumentError, match=variable) as refused:
        environment.mlflow_address()
    assert advice in str(refused.value)


def test_paths_become_absolute_and_uris_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    given = {"DISTILLKAC_CACHE": "cache", "TORCH_HOME": "~/torch", "AWS_CONFIG_FILE": "/etc/aws", "TMPDIR": "../tmp/"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    environment.make_absolute()
    assert {name: os.environ[name] for name in given} == {
        "DISTILLKAC_CACHE": f"{folder}/cache",
        "TORCH_HOME": f"{folder}/home/torch",
        "AWS_CONFIG_FILE": "/etc/aws",
        "TMPDIR": f"{folder.parent}/tmp",
    }
    monkeypatch.setenv("DISTILLKAC_CACHE", "s3://bucket/cache")
    environment.make_absolute()
    assert os.environ["DISTILLKAC_CACHE"] == "s3://bucket/cache"


@pytest.mark.ray
def test_every_trial_of_a_sweep_logs_to_a_relative_database(folder: Path, small_store: str, project_root: Path):
    options = ["--store", small_store, "--out", "sweep", "--steps", "1", "2", "--guidance", "0"]
    options += ["--optimizer.updates", "5", "--samples", "200"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.sweep", *options],
        cwd=folder,
        env={
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "PYTHONPATH": str(project_root),
            "HOME": str(folder),
            environment.TRACKING: "sqlite:///mlflow.db",
            "DISTILLKAC_CACHE": "cache",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.relative_to(folder) for path in folder.rglob("*.db")] == [Path("mlflow.db")]
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name(tracking.experiment_name())
    trials = client.search_runs([experiment.experiment_id], f"tags.`{tracking.STAGE_TAG}` = 'distill'")
    assert sorted(run.data.params["steps"] for run in trials) == ["1", "2"]
    assert {run.info.status for run in trials} == {"FINISHED"}
