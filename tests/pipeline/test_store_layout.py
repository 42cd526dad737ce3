"""Names, plans, identities: what a store is before it has a single row."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kac.path import PathConfig
from pipeline.store.layout import (
    Shard,
    StoreError,
    StoreIdentity,
    describe_difference,
    knot_column,
    parse_shard_name,
    plan_shards,
)
from pipeline.store.manifest import merge_ranges, read_manifest
from tests.pipeline.stores import (
    make_spec,
    make_store,
    make_teacher,
    plan_store,
    publish_shards,
    run_rollout,
    shard_file,
)

IDENTITY = {
    "source": "trajectory",
    "teacher_sha256": "ab" * 32,
    "path": PathConfig(),
    "solver": "ab2",
    "solver_steps": 100,
    "knots": 20,
    "seed": 0,
    "shard_size": 512,
    "dtype": "float32",
    "sample_shape": (1, 8, 8),
    "class_frequencies": (0.5, 0.5),
}
OTHERS = {
    "source": "forward",
    "teacher_sha256": "cd" * 32,
    "path": PathConfig(a=10.0),
    "solver": "euler",
    "solver_steps": 200,
    "knots": 10,
    "seed": 1,
    "shard_size": 256,
    "dtype": "float16",
    "sample_shape": (3, 8, 8),
    "class_frequencies": (0.25, 0.75),
    "data_sha256": "ef" * 32,
}


def test_there_is_an_other_value_for_every_field_of_the_identity() -> None:
    assert OTHERS.keys() == StoreIdentity.model_fields.keys()


@pytest.mark.parametrize("field", OTHERS)
def test_every_field_of_the_identity_changes_the_fingerprint_and_is_named_in_a_difference(field: str) -> None:
    one, other = StoreIdentity(**IDENTITY), StoreIdentity(**{**IDENTITY, field: OTHERS[field]})
    assert one.fingerprint() != other.fingerprint()
    assert describe_difference(one, other).startswith(f"{field} ")
    assert describe_difference(one, other).count("(found ") == 1


def test_the_fingerprint_is_the_content_alone() -> None:
    assert StoreIdentity(**IDENTITY).fingerprint() == StoreIdentity(**dict(reversed(IDENTITY.items()))).fingerprint()


def test_knot_columns_sort_as_the_knots_do() -> None:
    assert knot_column(0, 4) == "knot_00"
    assert knot_column(20, 20) == "knot_20"
    assert knot_column(7, 100) == "knot_007"
    names = StoreIdentity(**{**IDENTITY, "knots": 100}).knot_columns
    assert len(names) == 101
    assert names == sorted(names)


def test_the_schema_has_one_tensor_column_a_knot() -> None:
    schema = StoreIdentity(**{**IDENTITY, "knots": 2}).arrow_schema()
    assert schema.names == ["sample_id", "label", "kinetic_energy", "knot_00", "knot_01", "knot_02"]
    assert [str(field.type) for field in schema][:3] == ["int64", "int32", "float"]
    assert schema.field("knot_01").type.shape == [1, 8, 8]
    forward = StoreIdentity(**{**IDENTITY, "source": "forward", "dtype": "float16"}).arrow_schema()
    assert forward.names == ["sample_id", "label", "kinetic_energy", "interval", "knot_start", "knot_end"]
    assert str(forward.field("knot_end").type.value_type) == "halffloat"


@settings(deadline=None)
@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(min_value=0, max_value=10**9),
)
def test_a_shard_is_found_again_by_its_name(guidance: float, index: int) -> None:
    assert parse_shard_name(Shard(guidance, index, 0, 1).name) == (guidance, index)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "data/guidance=0.0/shard-1.parquet",
        "data/guidance=0.0/shard-000001.parquet.bak",
        "data/guidance=0.0/.shard-000001.parquet.host.1.abcdef01.tmp",
        "data/guidance=none/shard-000001.parquet",
        "data/guidance=0.0/more/shard-000001.parquet",
        "data/shard-000001.parquet",
        "backup/data/guidance=0.0/shard-000001.parquet",
        # The same numbers written another way would name one shard twice.
        "data/guidance=0/shard-000001.parquet",
        "data/guidance=0.00/shard-000001.parquet",
        "data/guidance=0.0/shard-0000001.parquet",
    ],
)
def test_other_names_are_no_shards(name: str) -> None:
    assert parse_shard_name(name) is None


@settings(deadline=None)
@given(
    st.integers(min_value=0, max_value=20),
    st.integers(min_value=1, max_value=200),
    st.integers(min_value=1, max_value=50),
)
def test_a_plan_holds_every_id_once_and_only_its_last_shard_is_short(first: int, count: int, size: int) -> None:
    ids = range(first * size, first * size + count)
    plan = plan_shards(1.5, ids, size)
    assert [i for shard in plan for i in shard.ids] == list(ids)
    assert all(shard.rows == size for shard in plan[:-1])
    assert all(shard.start == shard.index * size for shard in plan)
    assert len({shard.name for shard in plan}) == len(plan)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20))))
def test_merged_ranges_are_the_union(parts: list[tuple[int, int]]) -> None:
    ranges = [(start, start + length) for start, length in parts]
    merged = merge_ranges(ranges)
    assert {i for part in merged for i in range(*part)} == {i for part in ranges for i in range(*part)}
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(merged))


def test_a_finished_store_has_nothing_to_do_and_growth_redoes_only_the_short_shard(tmp_path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    store = tmp_path / "store"
    make_store(store, teacher)
    assert plan_store(make_spec(store, teacher)).todo == ()
    assert plan_store(make_spec(store, teacher, trajectories=40)).todo == ()  # asking for less takes nothing away
    grown = plan_store(make_spec(store, teacher, trajectories=150))
    assert [(shard.index, shard.start, shard.rows) for shard in grown.todo] == [(3, 96, 32), (4, 128, 22)]
    more = plan_store(make_spec(store, teacher, guidance=(0.0, 1.5)))
    assert {shard.guidance for shard in more.todo} == {1.5}
    assert sum(shard.rows for shard in more.todo) == 100


def test_growing_leaves_the_rows_that_were_there(tmp_path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    make_store(grown, teacher, trajectories=70)
    make_store(grown, teacher, trajectories=120)
    make_store(whole, teacher, trajectories=120)
    for index in range(4):
        assert shard_file(grown, index).read_bytes() == shard_file(whole, index).read_bytes()
    assert read_manifest(str(grown)).contents == read_manifest(str(whole)).contents


def test_another_spec_on_a_store_is_refused_by_the_names_of_the_fields(tmp_path) -> None:
    teacher, other_teacher = make_teacher(tmp_path / "one"), make_teacher(tmp_path / "two", seed=1)
    finished, begun = tmp_path / "finished", tmp_path / "begun"
    make_store(finished, teacher)
    run_rollout(make_spec(begun, teacher), is_sealed=False)
    for store in (finished, begun):
        with pytest.raises(StoreError, match=r"seed 5 \(found 0\), dtype float16 \(found float32\)"):
            plan_store(make_spec(store, teacher, seed=5, dtype="float16"))
        with pytest.raises(StoreError, match="teacher_sha256"):
            plan_store(make_spec(store, other_teacher))


def test_the_rows_do_not_depend_on_the_batch_size_or_on_who_computes_which_shard(tmp_path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    one, other = make_spec(tmp_path / "one", teacher), make_spec(tmp_path / "other", teacher)
    run_rollout(one)
    plan = plan_store(other)
    for part in (plan.todo[2:], plan.todo[:2]):
        publish_shards(other, plan._replace(todo=part))
    for index in range(4):
        assert shard_file(tmp_path / "one", index).read_bytes() == shard_file(tmp_path / "other", index).read_bytes()
