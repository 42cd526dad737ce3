"""Manifests: reading, writing, and refusing invalid manifests."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import store as endpoint_store
from pipeline.store.layout import StoreError
from pipeline.store.manifest import list_shards, merge_ranges, read_manifest, write_manifest
from tests.pipeline.store.reading import ROWS
from tests.pipeline.stores import copy_store


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20))))
def test_merged_ranges_are_the_union(parts: list[tuple[int, int]]) -> None:
    ranges = [(start, start + length) for start, length in parts]
    merged = merge_ranges(ranges)
    assert {i for part in merged for i in range(*part)} == {i for part in ranges for i in range(*part)}
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(merged))


def test_a_newer_store_is_refused(path: Path, tmp_path: Path) -> None:
    bad = copy_store(path, tmp_path / "bad")
    manifest = json.loads((bad / "manifest.json").read_text())
    (bad / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 2, "unheard": "of"}))
    with pytest.raises(StoreError, match="schema version 2"):
        endpoint_store.open(str(bad))


def test_a_changed_manifest_is_refused(path: Path, tmp_path: Path) -> None:
    bad = copy_store(path, tmp_path / "bad")
    text = (bad / "manifest.json").read_text()
    changed = text.replace('"seed": 0', '"seed": 1')
    assert changed != text
    (bad / "manifest.json").write_text(changed)
    with pytest.raises(StoreError, match=r"manifest\.json is damaged or was edited: its fingerprint"):
        endpoint_store.open(str(bad))


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "not a JSON object"),
        ("{", "not a JSON object"),
        ("\x00\xff", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("1.5", "not a JSON object"),
        ("{}", "schema_version"),
        ('{"schema_version": "1"}', "schema_version"),
        ('{"schema_version": null}', "schema_version"),
        ('{"schema_version": 1}', "`fingerprint`"),
    ],
)
def test_an_invalid_manifest_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=f"^{tmp_path}/manifest.json is not a valid manifest: .*{problem}"):
        endpoint_store.open(str(tmp_path))


@pytest.mark.parametrize(
    "location, value, name",
    [
        (["identity", "knots"], "many", "identity.knots"),
        (["identity", "sample_shape"], [1, "eight"], "identity.sample_shape"),
        (["identity", "source"], "dream", "identity.source"),
        (["identity"], None, "identity"),
        (["shards", 2, "rows"], "some", "shards.rows"),
        (["shards", 2], {}, "shards.name"),
        (["shards"], "all of them" * 100, "shards"),
        (["extents", 0, "ids"], 3, "extents.ids"),
        (["teacher"], 5, "teacher"),
    ],
)
def test_a_wrong_value_in_a_manifest_is_refused_by_its_name(path, tmp_path, location, value, name) -> None:
    bad = copy_store(path, tmp_path / "bad")
    manifest = json.loads((bad / "manifest.json").read_text())
    inner = manifest
    for key in location[:-1]:
        inner = inner[key]
    inner[location[-1]] = value
    (bad / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=f"^{bad}/manifest.json is not a valid manifest: `{name}`") as refusal:
        endpoint_store.open(str(bad))
    message = str(refusal.value)
    assert len(message) < 500
    assert "\n" not in message


def test_a_manifest_is_read_as_it_was_written(path: Path, tmp_path: Path) -> None:
    manifest = read_manifest(str(path))
    assert manifest is not None
    write_manifest(str(tmp_path), manifest)
    assert read_manifest(str(tmp_path)) == manifest
    assert read_manifest(str(tmp_path / "nowhere")) is None
    assert [shard.name for shard in manifest.plan()] == [receipt.name for receipt in manifest.shards]


def test_only_shards_are_listed(path: Path, tmp_path: Path) -> None:
    store = copy_store(path, tmp_path / "store")
    (store / "notes.txt").write_text("mine")
    (store / "data/guidance=0.0/shard-000001.parquet.bak").write_text("mine too")
    listed = list_shards(str(store))
    assert listed == {str(p.relative_to(store)): p.stat().st_size for p in store.rglob("*.parquet")}
    assert list(listed) == sorted(listed)
    assert list_shards(str(tmp_path / "nowhere")) == {}


def test_a_manifest_without_a_receipt_for_all_rows_is_refused(path: Path, tmp_path: Path) -> None:
    bad = copy_store(path, tmp_path / "bad")
    manifest = json.loads((bad / "manifest.json").read_text())
    for stop, name in ((ROWS + 1, "shard-000009"), (5000, "shard-000009")):
        manifest["extents"][0]["ids"] = [[0, stop]]
        (bad / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(StoreError, match=f"no receipt for all rows of .*{name}"):
            endpoint_store.open(str(bad))
