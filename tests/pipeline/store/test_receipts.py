"""A rerun need not read shards that are listed in receipt files of an unfinished store."""

import json
from pathlib import Path

import pytest

from pipeline.rollout import make_plan, rollout, rollout_stage
from pipeline.store.manifest import is_receipt_file, read_manifest, read_receipts, write_receipts
from tests.pipeline.stores import make_spec, plan_store, publish_shards, shard_file


def receipt_files(store: Path) -> list[str]:
    return [path.name for path in store.iterdir() if is_receipt_file(path.name)]


def test_a_rerun_reads_only_the_shards_without_a_receipt(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rollout_stage, "SHARDS_PER_RECEIPT_FILE", 3)
    spec = make_spec(tmp_path / "store", teacher)  # four shards: three in a receipt file, one without
    receipts = publish_shards(spec, plan_store(spec))
    assert len(receipt_files(tmp_path / "store")) == 1
    plan = make_plan(spec)
    assert (list(plan.finished), [shard.index for shard in plan.todo]) == (receipts[:3], [3])
    capsys.readouterr()
    manifest = rollout(spec)
    assert "0 trajectories computed in 0 shards, 100 reused in 4 shards" in capsys.readouterr().out
    assert manifest is not None
    assert list(manifest.shards) == receipts
    assert receipt_files(tmp_path / "store") == []


def test_receipt_files_next_to_a_manifest_are_removed(teacher: str, tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "store", teacher)
    manifest = rollout(spec)
    assert manifest is not None
    write_receipts(spec.store, manifest.identity, manifest.shards)
    assert rollout(spec) == manifest
    assert receipt_files(tmp_path / "store") == []


@pytest.mark.parametrize("what", ["cut short", "another store", "newer", "another size", "contradiction", "gone"])
def test_shards_of_an_unusable_receipt_file_are_read_again(teacher: str, tmp_path: Path, what: str) -> None:
    spec = make_spec(tmp_path / "store", teacher)
    plan = plan_store(spec)
    receipts = publish_shards(spec, plan)
    write_receipts(spec.store, plan.identity, receipts)
    file = next(path for path in (tmp_path / "store").iterdir() if is_receipt_file(path.name))
    text = file.read_text()
    assert make_plan(spec).finished == tuple(receipts)
    if what == "cut short":
        file.write_text(text[: len(text) // 2])
    elif what == "another store":
        file.write_text(text.replace(plan.identity.fingerprint(), "0" * 64))
    elif what == "newer":
        file.write_text(json.dumps({**json.loads(text), "schema_version": 2}))
    elif what == "another size":
        for receipt in receipts:
            with shard_file(spec.store, receipt.start // 32).open("ab") as shard:
                shard.write(b"x")
    elif what == "contradiction":
        other = [receipt.model_copy(update={"sha256": "0" * 64}) for receipt in receipts]
        write_receipts(spec.store, plan.identity, other)
    else:
        file.unlink()
    assert make_plan(spec).finished == ()
    if what == "gone":
        assert read_receipts(spec.store, plan.identity, [file.name]) == {}
        return
    manifest = rollout(spec)
    assert manifest is not None
    # The lengthened shard files are damaged. Recomputing them restores the original bytes.
    assert list(manifest.shards) == receipts
    assert read_manifest(spec.store) == manifest


def test_a_receipt_file_lists_a_short_last_shard_that_was_completed(teacher: str, tmp_path: Path) -> None:
    rollout(make_spec(tmp_path / "store", teacher))
    longer = make_spec(tmp_path / "store", teacher, trajectories=128)
    plan = plan_store(longer)
    (receipt,) = publish_shards(longer, plan)
    assert receipt.rows == 32
    write_receipts(longer.store, plan.identity, [receipt])
    assert make_plan(longer).finished[-1] == receipt
    assert make_plan(longer).todo == ()
