"""verify reports every kind of damage, and --repair removes only shards that must be recomputed."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.store.layout import Shard, StoreError
from pipeline.store.manifest import read_manifest
from pipeline.store.shards import check, column_array, encode, make_table
from pipeline.store.verify import VerifyReport, VerifySpec, examine, verify
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


@pytest.fixture
def store(whole: Path, tmp_path: Path, ray_cluster: None) -> Path:
    return copy_store(whole, tmp_path / "store")


def kinds(report: VerifyReport) -> dict[str, str]:
    return {problem.name: problem.kind for problem in report.problems}


def details(report: VerifyReport) -> dict[str, str]:
    return {problem.name: problem.detail for problem in report.problems}


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def name(index: int, guidance: float = 0.0) -> str:
    return Shard(guidance, index, 0, 0).name


def rewrite(store: Path, index: int, column: str, rows: list[int], value: float) -> None:
    """Replace values of a shard, and write correct CRCs."""
    identity, file = read_manifest(str(store)).identity, shard_file(store, index)
    shard = Shard(0.0, index, index * 32, 32)
    table = check(str(store), shard, identity, file.read_bytes())
    columns = {key: np.array(column_array(table[key])) for key in table.column_names}
    columns[column][rows] = value
    changed = make_table(identity, shard, columns)
    file.write_bytes(encode(changed))


def test_a_finished_store_is_intact(store: Path) -> None:
    before = contents(store)
    assert "run.json" in before
    report = verify(VerifySpec(store=str(store), repair=True))
    assert report.is_whole
    assert report.problems == ()
    assert (report.shards, report.rows) == (14, 400)
    assert report.bytes == sum(len(data) for key, data in before.items() if key.endswith(".parquet"))
    assert contents(store) == before


def test_every_kind_of_damage_is_reported_and_repaired(store: Path, folder: Path, teacher: str) -> None:
    good = contents(store)
    other = folder / "other"
    make_store(other, teacher, trajectories=200, guidance=SCALES, seed=9)
    shard_file(store, 0).unlink()
    flip(shard_file(store, 1), last_value(shard_file(store, 1), "knot_02"))
    shard_file(store, 2).write_bytes(shard_file(store, 2).read_bytes()[:-100])
    shard_file(store, 3).write_bytes(b"")
    rewrite(store, 4, "knot_03", [3, 7], np.nan)
    rewrite(store, 5, "kinetic_energy", [1], 0.25)  # a finite value, but not the published value
    shard_file(store, 6).write_bytes(shard_file(other, 6).read_bytes())
    shard_file(store, 0, 1.5).write_bytes(shard_file(store, 1, 1.5).read_bytes())  # also exists as shard 1
    shard_file(store, 5, 1.5).write_bytes(shard_file(store, 2, 1.5).read_bytes())
    shard_file(store, 2, 1.5).unlink()  # now exists only as shard 5
    shard_file(store, 40).write_bytes(good[name(3, 1.5)])  # beyond the plan
    shard_file(store, 41).write_bytes(shard_file(other, 0).read_bytes())
    (store / "data/guidance=1.5/shard-000003 (copy).parquet").write_bytes(good[name(3, 1.5)])
    (store / "data/guidance=1.5/mine.parquet").write_bytes(b"not even Parquet")
    (store / "data/guidance=1.5/shard-000003.parquet.bak").write_bytes(good[name(3, 1.5)])
    (store / "notes.txt").write_text("my notes")
    (store / "data/guidance=0.0/.shard-000000.parquet.elsewhere.1.abcdef01.tmp").write_bytes(b"PAR1")
    expected = {
        name(0): "missing",
        name(1): "damaged",
        name(2): "damaged",
        name(3): "damaged",
        name(4): "not finite",
        name(5): "damaged",
        name(6): "foreign",
        name(0, 1.5): "duplicated",
        name(2, 1.5): "missing",
        name(5, 1.5): "foreign",
        name(40): "duplicated",
        name(41): "foreign",
        "data/guidance=1.5/shard-000003 (copy).parquet": "duplicated",
        "data/guidance=1.5/mine.parquet": "extra",
        "data/guidance=1.5/shard-000003.parquet.bak": "extra",
        "notes.txt": "extra",
        "data/guidance=0.0/.shard-000000.parquet.elsewhere.1.abcdef01.tmp": "leftover",
    }
    before = contents(store)
    report = verify(VerifySpec(store=str(store)))
    assert kinds(report) == expected
    assert not report.is_whole
    assert report.removed == ()
    assert contents(store) == before
    detail = details(report)
    assert "samples 0 to 31" in detail[name(0)]
    assert "CRC" in detail[name(1)]
    assert "NaN or infinity in samples 131, 135 (knot_03)" in detail[name(4)]
    assert "sha256" in detail[name(5)]
    assert "seed is 9, expected 0" in detail[name(6)]
    assert name(2, 1.5) in detail[name(5, 1.5)]
    assert all("\n" not in text and str(store) not in text for text in detail.values())

    repaired = verify(VerifySpec(store=str(store), repair=True))
    assert kinds(repaired) == expected
    bad = {key for key, kind in expected.items() if kind not in ("missing", "extra", "leftover")}
    assert set(repaired.removed) == bad
    assert contents(store) == {key: data for key, data in before.items() if key not in bad}

    spec = make_spec(store, teacher, trajectories=200, guidance=SCALES)
    expected_todo = {name(index) for index in range(7)} | {name(0, 1.5), name(2, 1.5), name(5, 1.5)}
    assert {shard.name for shard in plan_store(spec).todo} == expected_todo
    run_rollout(spec)
    again = verify(VerifySpec(store=str(store)))
    assert again.is_whole
    assert set(kinds(again).values()) == {"extra", "leftover"}
    assert {key: data for key, data in contents(store).items() if key in good} == good


@pytest.mark.parametrize("compression, dtype", [("none", "float32"), ("zstd", "float16"), ("lz4", "float32")])
def test_every_flipped_bit_in_a_listed_shard_is_detected(tmp_path: Path, teacher: str, compression, dtype) -> None:
    manifest = make_store(tmp_path / "store", teacher, trajectories=40, compression=compression, dtype=dtype)
    pick = random.Random(1)
    for receipt in manifest.shards:
        file = tmp_path / "store" / receipt.name
        good = file.read_bytes()
        assert examine(str(tmp_path / "store"), manifest.identity, receipt.name, receipt).kind == ""
        for position in {0, 3, len(good) - 8, len(good) - 1, *(pick.randrange(len(good)) for _ in range(200))}:
            flip(file, position, 1 << pick.randrange(8))
            result = examine(str(tmp_path / "store"), manifest.identity, receipt.name, receipt)
            assert result.kind == "damaged", f"byte {position}: {result}"
            file.write_bytes(good)


def test_a_flipped_bit_in_an_unfinished_store_is_detected(tmp_path: Path, teacher: str, ray_cluster) -> None:
    spec = make_spec(tmp_path / "begun", teacher, compression="zstd")
    run_rollout(spec, is_sealed=False)
    identity = plan_store(spec).identity
    for index in range(3):
        file = shard_file(spec.store, index)
        good = file.read_bytes()
        for column in ("sample_id", "label", "kinetic_energy", *identity.knot_columns):
            flip(file, last_value(file, column))
            assert examine(spec.store, identity, name(index), None).kind == "damaged", column
            file.write_bytes(good)
    flip(shard_file(spec.store, 1), last_value(shard_file(spec.store, 1), "knot_00"))
    report = verify(VerifySpec(store=spec.store, repair=True))
    assert kinds(report) == {"manifest.json": "unfinished", name(1): "damaged"}
    assert not report.is_whole
    assert report.removed == (name(1),)
    assert report.shards == 3
    assert "unfinished" in details(report)["manifest.json"]
    run_rollout(spec)
    assert verify(VerifySpec(store=spec.store)).is_whole


def test_foreign_shards_of_an_unfinished_store_are_kept(tmp_path: Path, teacher: str, ray_cluster) -> None:
    """Without a manifest, verify cannot know which identity is right. Here the first shards are foreign."""
    spec = make_spec(tmp_path / "begun", teacher, trajectories=160)
    run_rollout(spec, is_sealed=False)
    run_rollout(make_spec(tmp_path / "other", teacher, seed=9), is_sealed=False)
    for index in range(2):
        shard_file(spec.store, index).write_bytes(shard_file(tmp_path / "other", index).read_bytes())
    before = contents(Path(spec.store))
    report = verify(VerifySpec(store=spec.store, repair=True))
    assert kinds(report) == {"manifest.json": "unfinished", name(0): "foreign", name(1): "foreign"}
    assert report.removed == ()
    assert contents(Path(spec.store)) == before


def test_a_growing_store_is_not_damaged(store: Path, teacher: str) -> None:
    run_rollout(make_spec(store, teacher, trajectories=230, guidance=SCALES), is_sealed=False)
    before = contents(store)
    report = verify(VerifySpec(store=str(store), repair=True))
    assert kinds(report) == {name(7): "unplanned", name(7, 1.5): "unplanned"}
    assert "6 rows that manifest.json does not list" in details(report)[name(7)]
    assert contents(store) == before
    assert report.rows == 2 * (6 * 32 + 32 + 6)
    flip(shard_file(store, 6), last_value(shard_file(store, 6), "knot_01"))
    assert kinds(verify(VerifySpec(store=str(store))))[name(6)] == "damaged"


def test_a_shard_with_too_few_rows_is_damaged(store: Path, folder: Path, teacher: str) -> None:
    make_store(folder / "short", teacher, trajectories=40)
    shard_file(store, 1).write_bytes(shard_file(folder / "short", 1).read_bytes())
    report = verify(VerifySpec(store=str(store)))
    assert kinds(report) == {name(1): "damaged"}
    assert details(report)[name(1)] == "has 8 rows instead of 32."


def test_repair_keeps_a_file_that_changed_after_the_check(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running rollout may recompute a shard between the check and the repair."""
    from pipeline.store import verify as module

    good = shard_file(store, 2).read_bytes()
    flip(shard_file(store, 2), 50)
    examine_all = module.examine_all

    def examine_then_restore(*arguments):
        checks = examine_all(*arguments)
        shard_file(store, 2).write_bytes(good)
        return checks

    monkeypatch.setattr(module, "examine_all", examine_then_restore)
    report = verify(VerifySpec(store=str(store), repair=True))
    assert kinds(report) == {name(2): "damaged"}
    assert report.removed == ()
    assert shard_file(store, 2).read_bytes() == good


def test_a_newer_shard_is_reported_and_kept(tmp_path: Path, teacher: str, ray_cluster: None) -> None:
    spec = make_spec(tmp_path / "begun", teacher)
    run_rollout(spec, is_sealed=False)
    file = shard_file(spec.store, 1)
    table = pq.read_table(file, partitioning=None)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"schema_version": b"2"}), file)
    report = verify(VerifySpec(store=spec.store, repair=True))
    assert kinds(report) == {"manifest.json": "unfinished", name(1): "newer"}
    assert file.exists()


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a store")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match=f"{path} is not an endpoint store"):
            verify(VerifySpec(store=str(path)))


def test_the_job_prints_one_line_per_problem_and_exits_with_1(store: Path, monkeypatch, capsys) -> None:
    assert run_job(monkeypatch, "verify", str(store)) == 0
    out, err = capsys.readouterr()
    assert f"verify: {store} has 14 intact shards with 400 rows" in out
    assert "error" not in err
    (store / "notes.txt").write_text("my notes")
    assert run_job(monkeypatch, "verify", str(store)) == 0
    assert "verify: extra: notes.txt " in capsys.readouterr().out
    shard_file(store, 3).unlink()
    flip(shard_file(store, 4), 100)
    assert run_job(monkeypatch, "verify", str(store)) == 1
    out, err = capsys.readouterr()
    assert (
        sum(line.startswith(f"verify: missing: {name(3)} ") and "96 to 127" in line for line in out.splitlines()) == 1
    )
    assert sum(line.startswith(f"verify: damaged: {name(4)} ") for line in out.splitlines()) == 1
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line.startswith(f"python -m jobs.store verify: error: {store} ")
    assert "1 damaged, 1 missing" in line
    assert f"`python -m jobs.store verify {store} --repair`" in line
    assert run_job(monkeypatch, "verify", str(store), "--repair") == 1
    out, err = capsys.readouterr()
    assert any(
        line.startswith(f"verify: damaged: {name(4)}") and line.endswith(" It was removed.")
        for line in out.splitlines()
    )
    assert "1 damaged, 1 missing" in err
    assert "--repair" not in err
    assert not shard_file(store, 4).exists()


def test_the_job_refuses_a_newer_store_in_one_line(whole: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    newer = copy_store(whole, tmp_path / "newer")
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 7}))
    for arguments, problem in [
        (("verify", str(newer)), "schema version 7"),
        (("describe", str(newer)), "schema version 7"),
        (("describe", str(tmp_path / "none")), "none is not an endpoint store"),
    ]:
        assert run_job(monkeypatch, *arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("python -m jobs.store")
        assert "error: " in line
        assert problem in line
