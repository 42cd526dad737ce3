"""One tracking database and one embedded Ray a test session."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# As the jobs do, and before anything imports torch or Ray.
import jobs  # noqa: F401  isort: skip
import pytest

from kac.util.log import show


@pytest.fixture(scope="session", autouse=True)
def tracking_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's database for this session, created before any two processes could race for its migration."""
    folder = tmp_path_factory.mktemp("tracking")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    from pipeline import tracking

    tracking.connect(uri)
    yield uri
    if before is None:
        del os.environ["MLFLOW_TRACKING_URI"]
    else:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="session", autouse=True)
def log() -> None:
    """Print the lines of the project, as the jobs do."""
    show()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this session's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLKAC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ray_cluster(tracking_database: str) -> Iterator[None]:
    """An embedded Ray with two CPUs, shared by all tests that need one."""
    import ray

    from pipeline.cluster import connection as cluster

    os.environ.pop("RAY_ADDRESS", None)
    cluster.keep_to_this_machine()
    ray.init(num_cpus=2, include_dashboard=True, logging_level="ERROR")
    cluster.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    """The S3 server that a test module names in its environment; see ``tests/pipeline/s3_server.py``."""
    from tests.pipeline.s3_server import SERVER

    SERVER.start()
    yield SERVER
    SERVER.stop()


@pytest.fixture(scope="module", autouse=True)
def no_cpu_stays_taken() -> Iterator[None]:
    """What a file of tests leaves behind on Ray would fail another file, minutes later."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        from tests.pipeline.stages import all_cpus_come_free

        assert all_cpus_come_free(), "expected Ray's CPUs to be free after the tests of this file, found some held"


@pytest.fixture
def project_root() -> Path:
    """The checkout, where `python -m jobs.*` runs."""
    return Path(__file__).parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use Ray or S3 through a fixture, before pytest selects tests by marker."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        for fixture, marker in (("ray_cluster", "ray"), ("s3_server", "s3")):
            if fixture in fixtures:
                item.add_marker(marker)
