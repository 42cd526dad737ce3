"""Merging stores, and refusing stores that do not fit together."""

from pathlib import Path

import pytest

from kac.util import files
from kac.util.errors import ArgumentError
from pipeline import store as endpoint_store
from pipeline.store.layout import Shard, StoreError
from pipeline.store.manifest import Manifest, read_manifest
from pipeline.store.merge import MergeSpec, merge
from pipeline.store.verify import VerifySpec, verify
from tests.pipeline.store.reading import run_job
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


@pytest.fixture(scope="module")
def parts(folder: Path, teacher: str) -> tuple[str, str, str]:
    """Three stores: samples 0 to 63 and 64 to 163 of two guidance scales, and 0 to 39 of a third scale."""
    make_store(folder / "one", teacher, trajectories=64, guidance=(0.0, 1.5))
    make_store(folder / "two", teacher, trajectories=100, first_sample=64, guidance=(0.0, 1.5))
    make_store(folder / "three", teacher, trajectories=40, guidance=(3.0,))
    return str(folder / "one"), str(folder / "two"), str(folder / "three")


def join(*stores: str, into: Path | str) -> Manifest:
    return merge(MergeSpec(stores=stores, into=str(into)))


def tree(store: Path | str) -> dict[str, bytes]:
    """Read all files except run.json, which a merged store does not have."""
    files = (path for path in Path(store).rglob("*") if path.is_file() and path.name != "run.json")
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def test_merged_stores_equal_one_rollout(parts, tmp_path: Path, teacher: str) -> None:
    one, two, _ = parts
    join(two, one, into=tmp_path / "joined")
    make_store(tmp_path / "one rollout", teacher, trajectories=164, guidance=(0.0, 1.5))
    assert tree(tmp_path / "joined") == tree(tmp_path / "one rollout")
    spec = make_spec(tmp_path / "joined", teacher, trajectories=164, guidance=(0.0, 1.5))
    assert plan_store(spec).todo == ()


def test_a_merged_store_is_intact_and_yields_every_row_once(parts, tmp_path: Path, ray_cluster: None) -> None:
    manifest = join(*parts, into=tmp_path / "joined")
    assert {extent.guidance: extent.ids for extent in manifest.extents} == {
        0.0: ((0, 164),),
        1.5: ((0, 164),),
        3.0: ((0, 40),),
    }
    assert manifest == read_manifest(str(tmp_path / "joined"))
    report = verify(VerifySpec(store=str(tmp_path / "joined")))
    assert report.problems == ()
    assert report.rows == 2 * 164 + 40
    store = endpoint_store.open(str(tmp_path / "joined"))
    ids = [int(i) for batch in store.batches(10, 1.5, [0], seed=1) for i in batch.sample_id]
    assert sorted(ids) == list(range(164))


def test_id_ranges_with_a_gap_stay_separate(parts, tmp_path: Path, teacher: str, ray_cluster: None) -> None:
    make_store(tmp_path / "far", teacher, trajectories=40, first_sample=224, guidance=(0.0,))
    manifest = join(*parts, str(tmp_path / "far"), into=tmp_path / "joined")
    assert manifest.ids(0.0) == ((0, 164), (224, 264))
    assert verify(VerifySpec(store=str(tmp_path / "joined"))).is_whole
    store = endpoint_store.open(str(tmp_path / "joined"))
    ids = [int(i) for batch in store.batches(10, 0.0, [0]) for i in batch.sample_id]
    assert ids == [*range(164), *range(224, 264)]
    # Filling the gap recomputes only the short shard at the edge of the gap.
    filled = plan_store(make_spec(tmp_path / "joined", teacher, trajectories=264))
    assert [shard.index for shard in filled.todo] == [5, 6]


def test_a_rerun_copies_only_missing_shards(parts, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    into = tmp_path / "joined"
    join(*parts, into=into)
    whole = tree(into)
    written = []
    write_bytes = files.write_bytes

    def recording(path: str, data: bytes, if_absent: bool = False) -> bool:
        written.append(Path(path).name)
        return write_bytes(path, data, if_absent)

    monkeypatch.setattr(files, "write_bytes", recording)
    for is_finished in (True, False):
        shard_file(into, 1).unlink()
        damaged = shard_file(into, 2, 1.5)
        damaged.write_bytes(damaged.read_bytes()[:99])
        if not is_finished:
            (into / "manifest.json").unlink()
        written.clear()
        join(*parts, into=into)
        assert sorted(key for key in written if key.startswith("shard")) == [
            "shard-000001.parquet",
            "shard-000002.parquet",
        ]
        assert tree(into) == whole
        assert "2 shards copied, 12 already existed" in capsys.readouterr().out
    written.clear()
    join(*parts, into=into)
    assert not [key for key in written if key.startswith("shard")]


def test_a_rerun_finishes_a_stopped_merge(parts, tmp_path: Path, monkeypatch) -> None:
    into, write_bytes = tmp_path / "joined", files.write_bytes

    def full_disk(path: str, data: bytes, if_absent: bool = False) -> bool:
        if path.endswith("guidance=1.5/shard-000004.parquet"):
            raise OSError(28, "No space left on device")
        return write_bytes(path, data, if_absent)

    monkeypatch.setattr(files, "write_bytes", full_disk)
    with pytest.raises(StoreError, match=r"guidance=1.5/shard-000004.parquet .*No space left on device"):
        join(*parts, into=into)
    assert read_manifest(str(into)) is None
    monkeypatch.undo()
    join(*parts, into=into)
    join(*parts, into=tmp_path / "fresh")
    assert tree(into) == tree(tmp_path / "fresh")


def test_a_short_shard_that_grew_after_the_manifest_is_copied_with_its_new_rows(
    parts, tmp_path, teacher, ray_cluster
) -> None:
    grown = copy_store(parts[2], tmp_path / "grown")
    run_rollout(make_spec(grown, teacher, trajectories=60, guidance=(3.0,)), is_sealed=False)
    manifest = join(parts[0], str(grown), into=tmp_path / "joined")
    assert manifest.ids(3.0) == ((0, 40),)
    assert {receipt.name: receipt.rows for receipt in manifest.shards}[Shard(3.0, 1, 0, 0).name] == 28
    assert verify(VerifySpec(store=str(tmp_path / "joined"))).is_whole
    assert endpoint_store.open(str(tmp_path / "joined")).rows(3.0) == 40


def test_stores_of_a_different_identity_are_refused_with_the_fields(parts, tmp_path: Path, teacher: str) -> None:
    make_store(tmp_path / "other", teacher, trajectories=40, first_sample=640, seed=3, dtype="float16")
    with pytest.raises(
        StoreError, match=r"other cannot be merged with .*seed is 3, expected 0; dtype is float16, expected float32"
    ):
        join(parts[0], str(tmp_path / "other"), into=tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_overlapping_samples_are_refused_with_the_names_of_the_stores(parts, tmp_path: Path, teacher: str) -> None:
    make_store(tmp_path / "lap", teacher, trajectories=96, first_sample=128, guidance=(1.5,))
    with pytest.raises(StoreError, match=r"lap and .*/two both have samples from 128 at guidance 1.5"):
        join(*parts, str(tmp_path / "lap"), into=tmp_path / "joined")
    with pytest.raises(StoreError, match=r"/one and .*/one both have samples from 0 at guidance 0"):
        join(parts[0], parts[0], into=tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_unfinished_and_missing_sources_are_refused(parts, tmp_path: Path, teacher: str) -> None:
    run_rollout(make_spec(tmp_path / "begun", teacher, first_sample=640), is_sealed=False)
    with pytest.raises(StoreError, match=r"begun is unfinished: it has 4 shards"):
        join(parts[0], str(tmp_path / "begun"), into=tmp_path / "joined")
    with pytest.raises(StoreError, match=r"nowhere is not an endpoint store"):
        join(parts[0], str(tmp_path / "nowhere"), into=tmp_path / "joined")
    holed = copy_store(parts[1], tmp_path / "holed")
    shard_file(holed, 3).unlink()
    with pytest.raises(StoreError, match=r"holed lacks 1 of its 8 shards"):
        join(parts[0], str(holed), into=tmp_path / "joined")


@pytest.mark.parametrize("damage", ["value", "footer", "truncated", "other shard"])
def test_a_damaged_source_is_named_and_no_manifest_is_written(parts, tmp_path: Path, damage: str) -> None:
    bad = copy_store(parts[1], tmp_path / "bad")
    file = shard_file(bad, 3)
    if damage == "value":
        flip(file, last_value(file, "knot_01"))
    elif damage == "footer":
        flip(file, file.stat().st_size - 12)  # a byte of the writer's name, which readers ignore
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.write_bytes(shard_file(bad, 4).read_bytes())
    with pytest.raises(StoreError, match=r"bad/data/guidance=0.0/shard-000003.parquet .*--repair") as refusal:
        join(parts[0], str(bad), into=tmp_path / "joined")
    assert "\n" not in str(refusal.value)
    assert read_manifest(str(tmp_path / "joined")) is None


def test_a_target_with_different_content_is_refused_and_unchanged(parts, tmp_path: Path, teacher: str) -> None:
    make_store(tmp_path / "finished", teacher, trajectories=10)
    make_store(tmp_path / "other spec", teacher, trajectories=64, guidance=(0.0, 1.5), seed=8)
    run_rollout(make_spec(tmp_path / "begun", teacher, trajectories=32, guidance=(9.0,)), is_sealed=False)
    run_rollout(make_spec(tmp_path / "begun other", teacher, trajectories=32, seed=8), is_sealed=False)
    for into, problem in [
        (tmp_path / "finished", "finished is a finished store with other samples"),
        (tmp_path / "other spec", "seed is 8, expected 0"),
        (tmp_path / "begun", "data/guidance=9.0/shard-000000.parquet, which is not in the stores to merge"),
        (tmp_path / "begun other", "seed is 8, expected 0"),
    ]:
        before = tree(into)
        with pytest.raises(StoreError, match=problem):
            join(*parts, into=into)
        assert tree(into) == before


def test_a_target_that_is_one_of_the_stores_is_refused(parts) -> None:
    before = tree(parts[0])
    with pytest.raises(ArgumentError, match=r"^`into` .* is the same path as `stores` "):
        join(*parts, into=parts[0])
    assert tree(parts[0]) == before


def test_a_merge_reuses_the_shards_of_an_unfinished_rollout(parts, tmp_path: Path, teacher: str) -> None:
    run_rollout(make_spec(tmp_path / "joined", teacher, trajectories=64), is_sealed=False)
    join(*parts, into=tmp_path / "joined")
    join(*parts, into=tmp_path / "fresh")
    assert tree(tmp_path / "joined") == tree(tmp_path / "fresh")


def test_a_merge_works_with_other_filesystems(parts, tmp_path: Path) -> None:
    """All access uses fsspec. The test merges local stores into a remote store, and that store into a local store."""
    remote = f"memory://merge/{tmp_path.name}"
    join(parts[0], parts[2], into=remote)
    join(remote, parts[1], into=tmp_path / "back")
    join(*parts, into=tmp_path / "local")
    back, local = tree(tmp_path / "back"), tree(tmp_path / "local")
    assert back == local


def test_the_job_merges_and_prints_one_line_per_error(parts, tmp_path: Path, monkeypatch, capsys) -> None:
    assert run_job(monkeypatch, "merge", *parts, "--into", str(tmp_path / "joined")) == 0
    assert "merge: wrote" in capsys.readouterr().out
    assert run_job(monkeypatch, "merge", parts[0], parts[0], "--into", str(tmp_path / "twice")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("python -m jobs.store merge: error: ")
    assert "samples from 0 at guidance 0" in line
