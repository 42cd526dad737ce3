"""Descriptions of stores, finished and unfinished."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.store.describe import describe
from pipeline.store.layout import StoreError
from pipeline.store.manifest import read_manifest
from pipeline.store.shards import column_array
from tests.pipeline.store.reading import SCALES, run_job
from tests.pipeline.stores import (
    copy_store,
    flip,
    last_value,
    make_spec,
    make_store,
    plan_store,
    run_rollout,
    shard_file,
)


def test_a_description_counts_rows_shards_and_bytes(whole: Path, teacher: str) -> None:
    description = describe(str(whole))
    manifest = read_manifest(str(whole))
    assert description["is_finished"]
    assert description["fingerprint"] == manifest.fingerprint
    assert description["identity"] == manifest.identity.values()
    assert description["teacher"] == teacher
    assert (description["rows"], description["shards"]) == (400, 14)
    assert description["bytes"] == sum(receipt.bytes for receipt in manifest.shards)
    assert description["tensor_bytes"] == 400 * 5 * 2 * 4
    assert [scale["guidance"] for scale in description["scales"]] == list(SCALES)
    for scale in description["scales"]:
        assert (scale["rows"], scale["shards"], scale["ids"]) == (200, 7, ((0, 200),))
        tables = [pq.read_table(shard_file(whole, index, scale["guidance"]), partitioning=None) for index in range(7)]
        energies = np.concatenate([column_array(table["kinetic_energy"]) for table in tables])
        for label, share in {"0%": 0, "5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "100%": 1}.items():
            assert scale["kinetic_energy"][label] == pytest.approx(np.quantile(energies, share), rel=1e-6)
        assert scale["kinetic_energy"]["0%"] > 0


def test_an_unfinished_store_is_described_from_its_shards(tmp_path: Path, teacher: str) -> None:
    spec = make_spec(tmp_path / "begun", teacher, guidance=SCALES)
    run_rollout(spec, is_sealed=False)
    shard_file(spec.store, 1, 1.5).unlink()
    description = describe(spec.store)
    assert not description["is_finished"]
    assert description["teacher"] is None
    assert [scale["ids"] for scale in description["scales"]] == [((0, 100),), ((0, 32), (64, 100))]
    assert description["fingerprint"] == plan_store(spec).identity.fingerprint()


def test_a_growing_store_is_described_by_its_manifest(tmp_path: Path, teacher: str) -> None:
    make_store(tmp_path / "store", teacher, trajectories=40)
    run_rollout(make_spec(tmp_path / "store", teacher, trajectories=100), is_sealed=False)
    (scale,) = describe(str(tmp_path / "store"))["scales"]
    assert (scale["rows"], scale["ids"], scale["shards"]) == (40, ((0, 40),), 2)


def test_the_job_prints_yaml_or_json(whole: Path, monkeypatch, capsys) -> None:
    manifest = read_manifest(str(whole))
    outputs = []
    for flags in ([], ["--json"]):
        assert run_job(monkeypatch, "describe", str(whole), *flags) == 0
        output = capsys.readouterr()
        assert output.err == ""
        outputs.append(output.out)
    text, values = outputs[0], json.loads(outputs[1])
    assert yaml.safe_load(text) == values
    for fact in (manifest.teacher, "is_finished: true", "rows: 400", "- [0, 200]", "50%: ", "shard_size: 32"):
        assert fact in text
    assert values["fingerprint"] == manifest.fingerprint
    assert values["identity"].keys() == type(manifest.identity).model_fields.keys()
    assert [scale["rows"] for scale in values["scales"]] == [200, 200]


def test_describe_names_a_damaged_shard(whole: Path, tmp_path: Path) -> None:
    bad = copy_store(whole, tmp_path / "bad")
    flip(shard_file(bad, 3), last_value(shard_file(bad, 3), "kinetic_energy"))
    with pytest.raises(StoreError, match=r"bad/data/guidance=0.0/shard-000003.parquet is damaged"):
        describe(str(bad))
