"""Fixtures: a teacher, its store and a student, made once per test process."""

import pytest

from pipeline.distill import distill
from tests.pipeline.stages import distill_spec
from tests.pipeline.stores import make_store, make_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, tracking_database: str) -> str:
    """The model folder of an untrained teacher of the moons."""
    return make_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory, teacher: str) -> str:
    """A store of 400 trajectories with 4 knots at each of two guidance scales."""
    path = str(tmp_path_factory.mktemp("stores") / "store")
    make_store(path, teacher, trajectories=400, shard_size=128, guidance=(0.0, 1.0))
    return path


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory, small_store: str) -> str:
    """The model folder of a student of two steps."""
    out = tmp_path_factory.mktemp("students") / "two"
    distill(distill_spec(small_store, out))
    return str(out)
