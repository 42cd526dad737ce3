"""The manifest says what a store is; one that does not is refused in a sentence for people."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import store as endpoint_store
from pipeline.store.layout import StoreError
from pipeline.store.manifest import list_files, list_shards, merge_ranges, read_manifest, write_manifest
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
    with pytest.raises(StoreError, match=r"expected store schema version 1 or older, found 2: use a newer distillkac"):
        endpoint_store.open(str(bad))


def test_a_changed_manifest_is_refused(path: Path, tmp_path: Path) -> None:
    bad = copy_store(path, tmp_path / "bad")
    text = (bad / "manifest.json").read_text()
    changed = text.replace('"seed": 0', '"seed": 1')
    assert changed != text
    (bad / "manifest.json").write_text(changed)
    with pytest.raises(StoreError, match=r"expected fingerprint .* the manifest was changed by hand or damaged"):
        endpoint_store.open(str(bad))


@pytest.mark.parametrize(
    "text, found",
    [
        ("", "found no JSON: empty, cut short or damaged text"),
        ("{", "found no JSON: empty, cut short or damaged text"),
        ("\x00\xff", "found no JSON: empty, cut short or damaged text"),
        ("[]", "found a list in place of a JSON object"),
        ("null", "found null in place of a JSON object"),
        ("true", "found a truth value in place of a JSON object"),
        ('"manifest"', "found a string in place of a JSON object"),
        ("1.5", "found a number in place of a JSON object"),
        ("{}", "found a schema_version that is not a whole number"),
        ('{"schema_version": "1"}', "found a schema_version that is not a whole number"),
        ('{"schema_version": null}', "found a schema_version that is not a whole number"),
        ('{"schema_version": 1}', "found fingerprint: expected a value, found none"),
    ],
)
def test_what_is_no_manifest_is_refused_in_one_sentence_for_people(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError) as refusal:
        endpoint_store.open(str(tmp_path))
    assert str(refusal.value) == (
        f"{tmp_path}/manifest.json: expected the manifest of a store, {found}: "
        "if the shards are whole, delete it and run the rollout again: it adopts them"
    )


@pytest.mark.parametrize(
    "place, value, found",
    [
        (["identity", "knots"], "many", "found identity.knots: input should be a valid integer"),
        (["identity", "sample_shape"], [1, "eight"], "found identity.sample-shape: input should be a valid integer"),
        (["identity", "source"], "dream", "found identity.source: input should be 'trajectory' or 'forward'"),
        (["identity"], None, "found identity: input should be named values, found None"),
        (["shards", 2, "rows"], "some", "found shards.rows: input should be a valid integer"),
        (["shards", 2], {}, "found shards.name: expected a value, found none"),
        (["shards"], "all of them" * 100, "found shards: input should be a list, found "),
        (["extents", 0, "ids"], 3, "found extents.ids: input should be a list, found 3"),
        (["teacher"], 5, "found teacher: input should be a valid string, found 5"),
    ],
)
def test_a_wrong_value_in_a_manifest_is_refused_by_its_name(path, tmp_path, place, value, found) -> None:
    bad = copy_store(path, tmp_path / "bad")
    manifest = json.loads((bad / "manifest.json").read_text())
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (bad / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError) as refusal:
        endpoint_store.open(str(bad))
    says = str(refusal.value)
    assert says.startswith(f"{bad}/manifest.json: expected the manifest of a store, {found}")
    assert says.endswith("delete it and run the rollout again: it adopts them")
    assert len(says) < 500
    assert "\n" not in says


def test_a_manifest_is_read_as_it_was_written(path: Path, tmp_path: Path) -> None:
    manifest = read_manifest(str(path))
    assert manifest is not None
    write_manifest(str(tmp_path), manifest)
    assert read_manifest(str(tmp_path)) == manifest
    assert read_manifest(str(tmp_path / "nowhere")) is None
    assert [shard.name for shard in manifest.plan()] == [receipt.name for receipt in manifest.shards]


def test_files_are_listed_by_name_and_shards_are_those_named_like_one(path: Path, tmp_path: Path) -> None:
    store = copy_store(path, tmp_path / "store")
    (store / "notes.txt").write_text("mine")
    (store / "data/guidance=0.0/shard-000001.parquet.bak").write_text("mine too")
    listed, shards = list_files(str(store)), list_shards(str(store))
    on_disk = {str(p.relative_to(store)): p.stat().st_size for p in store.rglob("*") if p.is_file()}
    assert listed == {name: size for name, size in on_disk.items() if name not in {"manifest.json", "run.json"}}
    assert list(listed) == sorted(listed)
    assert set(listed) - set(shards) == {"notes.txt", "data/guidance=0.0/shard-000001.parquet.bak"}
    assert len(shards) == 20
    assert list_files(str(tmp_path / "nowhere")) == {}


def test_a_manifest_that_plans_rows_it_has_no_receipt_for_is_refused(path: Path, tmp_path: Path) -> None:
    bad = copy_store(path, tmp_path / "bad")
    manifest = json.loads((bad / "manifest.json").read_text())
    for stop, name in ((ROWS + 1, "shard-000009"), (5000, "shard-000009")):
        manifest["extents"][0]["ids"] = [[0, stop]]
        (bad / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(
            StoreError, match=f"expected a receipt for all rows of each planned shard, found none .*{name}"
        ):
            endpoint_store.open(str(bad))
