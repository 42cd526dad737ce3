"""Code in untrusted files is never run, and secrets are never written."""

import contextlib
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kac.util.errors import ArgumentError, one_line
from pipeline import tracking
from pipeline.config import DistillSpec, EvaluateSpec
from pipeline.store import shards
from pipeline.store.manifest import read_manifest
from tests.pipeline.stores import copy_store

PASSWORD = "correct-horse-battery"


class Touch:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


def with_pickled_labels(path: Path, touched: Path) -> bytes:
    """Return a shard whose labels have the type that Ray uses for pickles in Parquet."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    table = pq.read_table(path)
    stored = pa.array([pickle.dumps(Touch(touched))] * table.num_rows, pa.large_binary())
    labels = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), stored)
    column = table.schema.get_field_index("label")
    sink = pa.BufferOutputStream()
    pq.write_table(table.set_column(column, "label", labels), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("is_guarded", [True, False], ids=["guarded", "the attack works without the guard"])
def test_a_shard_with_pickles_is_damaged_and_nothing_is_unpickled(
    is_guarded: bool, small_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = copy_store(Path(small_store), tmp_path / "store")
    manifest = read_manifest(str(store))
    assert manifest is not None
    shard, touched = manifest.plan()[0], tmp_path / "touched"
    data = with_pickled_labels(store / shard.name, touched)
    if not is_guarded:
        monkeypatch.setattr(shards, "_check_types", lambda schema: None)
    refusal = pytest.raises(shards.DamagedShard, match=r"label.*ray\.data")
    with refusal if is_guarded else contextlib.suppress(Exception):
        shards.check(str(store), shard, manifest.identity, data)
    assert touched.exists() != is_guarded


@pytest.mark.parametrize(
    "path",
    [
        f"https://me:{PASSWORD}@host/store",
        f"s3://AKIA:{PASSWORD}@bucket/store",
        f"s3://bucket/store?X-Amz-Credential=a&X-Amz-Signature={PASSWORD}",
        f"https://host/store?access_token={PASSWORD}",
    ],
)
def test_a_path_with_a_password_is_refused_without_showing_it(path: str):
    for make in (
        lambda: DistillSpec(store=path, out="o"),
        lambda: EvaluateSpec(teacher="t", students=("s", path), out="o"),
    ):
        with pytest.raises(ArgumentError, match="password") as refusal:
            make()
        assert PASSWORD not in str(refusal.value)


def test_paths_that_only_look_like_secrets_are_accepted():
    for path in ("s3://bucket/me@home/a?versionId=3", "/data/a@b?key=1", "me@host:store"):
        assert DistillSpec(store=path, out="o").store == path


def test_messages_never_show_a_secret(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", PASSWORD)
    text = one_line(
        f"no answer of 'http://me:p@ss@host:1/x?a=1&X-Amz-Signature={PASSWORD[:9]}&b=2' for {PASSWORD}, "
        f"nor of postgresql://me:{PASSWORD}@db/x?password=abc"
    )
    assert text == (
        "no answer of 'http://host:1/x?a=1&X-Amz-Signature=...&b=2' for $RAY_AUTH_TOKEN, "
        "nor of postgresql://db/x?password=..."
    )
    assert tracking.without_password(f"http://me:{PASSWORD}@host:5000") == "http://host:5000"
