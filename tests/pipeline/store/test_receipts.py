"""Receipts that a rollout notes on its way spare the next one reading what they name, and nothing else."""

import json
from pathlib import Path

import pytest

from pipeline.rollout import make_plan, rollout
from pipeline.rollout import stage as rollout_stage
from pipeline.store.manifest import list_files, read_manifest
from pipeline.store.receipts import is_note, read_notes, write_note
from tests.pipeline.stores import make_spec, make_teacher, plan_store, publish_shards, shard_file


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_teacher(tmp_path_factory.mktemp("models") / "teacher")


def notes_in(store: Path) -> list[str]:
    return [path.name for path in store.iterdir() if is_note(path.name)]


def test_a_rollout_that_was_stopped_reads_only_the_shards_it_has_not_noted(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rollout_stage, "SHARDS_A_NOTE", 3)
    spec = make_spec(tmp_path / "store", teacher)  # four shards: three in a note, one without
    receipts = publish_shards(spec, plan_store(spec))
    assert len(notes_in(tmp_path / "store")) == 1
    plan = make_plan(spec)
    assert (list(plan.finished), [shard.index for shard in plan.todo]) == (receipts[:3], [3])
    assert not [name for name in list_files(spec.store) if is_note(name)]
    capsys.readouterr()
    manifest = rollout(spec)
    assert "0 trajectories computed in 0 shards, 100 reused in 4 shards" in capsys.readouterr().out
    assert manifest is not None
    assert list(manifest.shards) == receipts
    assert notes_in(tmp_path / "store") == []


def test_notes_of_a_driver_that_died_after_its_manifest_are_removed(teacher: str, tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "store", teacher)
    manifest = rollout(spec)
    assert manifest is not None
    write_note(spec.store, manifest.identity, manifest.shards)
    assert rollout(spec) == manifest
    assert notes_in(tmp_path / "store") == []


@pytest.mark.parametrize("what", ["cut short", "another store", "newer", "another size", "two notes", "gone"])
def test_a_note_that_cannot_be_trusted_costs_a_reading(teacher: str, tmp_path: Path, what: str) -> None:
    spec = make_spec(tmp_path / "store", teacher)
    plan = plan_store(spec)
    receipts = publish_shards(spec, plan)
    write_note(spec.store, plan.identity, receipts)
    note = next(path for path in (tmp_path / "store").iterdir() if is_note(path.name))
    text = note.read_text()
    assert make_plan(spec).finished == tuple(receipts)
    if what == "cut short":
        note.write_text(text[: len(text) // 2])
    elif what == "another store":
        note.write_text(text.replace(plan.identity.fingerprint(), "0" * 64))
    elif what == "newer":
        note.write_text(json.dumps({**json.loads(text), "schema_version": 2}))
    elif what == "another size":
        for receipt in receipts:
            with shard_file(spec.store, receipt.start // 32).open("ab") as file:
                file.write(b"x")
    elif what == "two notes":
        other = [receipt.model_copy(update={"sha256": "0" * 64}) for receipt in receipts]
        write_note(spec.store, plan.identity, other)
    else:
        note.unlink()
    assert make_plan(spec).finished == ()
    if what == "gone":
        assert read_notes(spec.store, plan.identity, [note.name]) == {}
        return
    manifest = rollout(spec)
    assert manifest is not None
    # The file that was lengthened is damaged: it was redone, and is as it was.
    assert list(manifest.shards) == receipts
    assert read_manifest(spec.store) == manifest


def test_a_last_shard_that_was_completed_is_known_by_its_note(teacher: str, tmp_path: Path) -> None:
    rollout(make_spec(tmp_path / "store", teacher))
    longer = make_spec(tmp_path / "store", teacher, trajectories=128)
    plan = plan_store(longer)
    (receipt,) = publish_shards(longer, plan)
    assert receipt.rows == 32
    write_note(longer.store, plan.identity, [receipt])
    assert make_plan(longer).finished[-1] == receipt
    assert make_plan(longer).todo == ()
