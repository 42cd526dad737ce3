"""One tracking database and one embedded Ray per test session."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Sets the jobs' environment before anything imports torch or Ray.
import jobs  # noqa: F401  isort: skip
import pytest

from kac.util.log import show


@pytest.fixture(scope="session", autouse=True)
def tracking_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's database for this session. It is created first, so that processes do not race to migrate it."""
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
    """Print the project's log lines, as the jobs do."""
    show()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A separate cache for this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLKAC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def ray_cluster(tracking_database: str) -> Iterator[None]:
    """An embedded Ray with two CPUs, shared by all tests that need Ray."""
    import ray

    from pipeline.cluster import connection as cluster
    from pipeline.cluster import ray_internals

    os.environ.pop("RAY_ADDRESS", None)
    ray_internals.keep_to_this_machine()
    ray.init(num_cpus=2, include_dashboard=True, logging_level="ERROR")
    cluster.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    """The S3 server to which test modules point their environment (``tests/pipeline/s3_server.py``)."""
    from tests.pipeline.s3_server import SERVER

    SERVER.start()
    yield SERVER
    SERVER.stop()


@pytest.fixture(scope="module", autouse=True)
def no_cpu_stays_in_use() -> Iterator[None]:
    """Check that each test file frees Ray's CPUs. Otherwise a later file would fail, minutes afterwards."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        from tests.pipeline.stages import wait_for_free_cpus

        assert wait_for_free_cpus(), "the tests in this file left some of Ray's CPUs in use"


@pytest.fixture
def project_root() -> Path:
    """The root of the checkout, where `python -m jobs.*` runs."""
    return Path(__file__).parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use Ray or S3 through a fixture, before pytest selects tests by marker."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        for fixture, marker in (("ray_cluster", "ray"), ("s3_server", "s3")):
            if fixture in fixtures:
                item.add_marker(marker)
