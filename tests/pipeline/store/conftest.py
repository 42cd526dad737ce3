"""Fixtures: small stores, and a counter of the bytes read."""

from collections import Counter
from pathlib import Path

import pytest

from kac.util import files
from pipeline import store as endpoint_store
from pipeline.store.reader import Store
from tests.pipeline.store.reading import KNOTS, ROWS, SCALES, CountingFileSystem
from tests.pipeline.stores import make_store, make_teacher


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="session")
def teacher(folder: Path) -> str:
    return make_teacher(folder / "teacher")


@pytest.fixture(scope="session")
def path(folder: Path, teacher: str) -> Path:
    """A store with 300 rows per guidance scale: nine shards of 32 rows and one of 12."""
    make_store(folder / "store", teacher, trajectories=ROWS, knots=KNOTS, guidance=SCALES)
    return folder / "store"


@pytest.fixture(scope="session")
def whole(folder: Path, teacher: str) -> Path:
    """A store with 200 rows per guidance scale: six shards of 32 rows and one of 8."""
    make_store(folder / "whole", teacher, trajectories=200, guidance=SCALES)
    return folder / "whole"


@pytest.fixture
def store(path: Path, ray_cluster: None) -> Store:
    return endpoint_store.open(str(path))


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the bytes read from each file."""
    counts: Counter[str] = Counter()
    locate = files.locate

    def counting(path: str) -> files.Location:
        location = locate(path)
        return files.Location(CountingFileSystem(location.fs, counts), location.path)

    monkeypatch.setattr(files, "locate", counting)
    return counts
