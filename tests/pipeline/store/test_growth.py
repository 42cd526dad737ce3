"""Growing a store computes only the missing rows, and requires the same identity."""

import pytest

from pipeline.store.layout import StoreError
from pipeline.store.manifest import read_manifest
from tests.pipeline.compare import assert_same_store
from tests.pipeline.stores import (
    make_spec,
    make_store,
    make_teacher,
    plan_store,
    publish_shards,
    run_rollout,
    shard_file,
)


def test_growth_plans_only_the_short_shard_and_the_new_shards(tmp_path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    store = tmp_path / "store"
    make_store(store, teacher)
    assert plan_store(make_spec(store, teacher)).todo == ()
    assert plan_store(make_spec(store, teacher, trajectories=40)).todo == ()  # requesting fewer removes nothing
    grown = plan_store(make_spec(store, teacher, trajectories=150))
    assert [(shard.index, shard.start, shard.rows) for shard in grown.todo] == [(3, 96, 32), (4, 128, 22)]
    more = plan_store(make_spec(store, teacher, guidance=(0.0, 1.5)))
    assert {shard.guidance for shard in more.todo} == {1.5}
    assert sum(shard.rows for shard in more.todo) == 100


def test_growth_keeps_existing_rows(tmp_path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    make_store(grown, teacher, trajectories=70)
    make_store(grown, teacher, trajectories=120)
    make_store(whole, teacher, trajectories=120)
    for index in (0, 1, 3):
        assert shard_file(grown, index).read_bytes() == shard_file(whole, index).read_bytes()
    assert_same_store(str(grown), str(whole))  # the new rows of shard 2 come from a different batch
    assert read_manifest(str(grown)).extents == read_manifest(str(whole)).extents


def test_a_different_spec_is_refused_with_the_names_of_the_fields(tmp_path) -> None:
    teacher, other_teacher = make_teacher(tmp_path / "one"), make_teacher(tmp_path / "two", seed=1)
    finished, begun = tmp_path / "finished", tmp_path / "begun"
    make_store(finished, teacher)
    run_rollout(make_spec(begun, teacher), is_sealed=False)
    for store in (finished, begun):
        with pytest.raises(StoreError, match=r"seed is 0, expected 5; dtype is float32, expected float16"):
            plan_store(make_spec(store, teacher, seed=5, dtype="float16"))
        with pytest.raises(StoreError, match="teacher_sha256"):
            plan_store(make_spec(store, other_teacher))


def test_the_rows_do_not_depend_on_the_order_of_shards(tmp_path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    one, other = make_spec(tmp_path / "one", teacher), make_spec(tmp_path / "other", teacher)
    run_rollout(one)
    plan = plan_store(other)
    for part in (plan.todo[2:], plan.todo[:2]):
        publish_shards(other, plan._replace(todo=part))
    for index in range(4):
        assert shard_file(tmp_path / "one", index).read_bytes() == shard_file(tmp_path / "other", index).read_bytes()
