"""The layout of a store: shard names, plans, schemas and identities."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kac.model import load_teacher_config
from kac.path import PathConfig
from kac.precision import Precision
from pipeline.config import RolloutRecipe, RolloutSpec
from pipeline.store.layout import (
    Shard,
    StoreIdentity,
    knot_column,
    parse_shard_name,
)
from pipeline.store.manifest import plan_shards
from tests.pipeline.stores import make_teacher

IDENTITY = {
    "source": "trajectory",
    "teacher_sha256": "ab" * 32,
    "path": PathConfig(a=9, c=3, clock="linear"),
    "precision": Precision(),
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
    "path": PathConfig(a=10, c=3, clock="linear"),
    "precision": Precision(dtype="bfloat16"),
    "solver": "euler",
    "solver_steps": 200,
    "knot_grid": "quadratic",
    "time_factor": 0.97,
    "knots": 10,
    "seed": 1,
    "shard_size": 256,
    "dtype": "float16",
    "sample_shape": (3, 8, 8),
    "class_frequencies": (0.25, 0.75),
    "data_sha256": "ef" * 32,
    "labels": "null",
}

NEUTRAL = {"knot_grid": "uniform", "time_factor": 1.0}


def test_these_tests_cover_every_field_of_the_identity() -> None:
    assert OTHERS.keys() == StoreIdentity.model_fields.keys()


@pytest.mark.parametrize("field", OTHERS)
def test_every_field_of_the_identity_changes_the_fingerprint_and_is_named_in_a_difference(field: str) -> None:
    one, other = StoreIdentity(**IDENTITY), StoreIdentity(**{**IDENTITY, field: OTHERS[field]})
    assert one.fingerprint() != other.fingerprint()
    assert one.difference(other).startswith((f"{field} ", f"{field}."))
    assert one.difference(other).count(", expected ") == 1


def test_the_fingerprint_does_not_depend_on_the_order_of_fields() -> None:
    assert StoreIdentity(**IDENTITY).fingerprint() == StoreIdentity(**dict(reversed(IDENTITY.items()))).fingerprint()


def test_knot_columns_sort_like_the_knots() -> None:
    assert knot_column(0, 4) == "knot_00"
    assert knot_column(20, 20) == "knot_20"
    assert knot_column(7, 100) == "knot_007"
    names = StoreIdentity(**{**IDENTITY, "knots": 100}).knot_columns
    assert len(names) == 101
    assert names == sorted(names)


def test_the_schema_has_one_tensor_column_per_knot() -> None:
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
def test_a_shard_name_is_parsed_back(guidance: float, index: int) -> None:
    assert parse_shard_name(Shard(guidance, index, 0, 0).name, 10) == Shard(guidance, index, 10 * index, 10)


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
        # Other spellings of the same numbers would give a shard a second name.
        "data/guidance=0/shard-000001.parquet",
        "data/guidance=0.00/shard-000001.parquet",
        "data/guidance=0.0/shard-0000001.parquet",
    ],
)
def test_other_names_are_not_shards(name: str) -> None:
    assert parse_shard_name(name) is None


@settings(deadline=None)
@given(
    st.integers(min_value=0, max_value=20),
    st.integers(min_value=1, max_value=200),
    st.integers(min_value=1, max_value=50),
)
def test_a_plan_contains_every_id_once_and_only_its_last_shard_is_short(first: int, count: int, size: int) -> None:
    ids = range(first * size, first * size + count)
    plan = plan_shards(1.5, ids, size)
    assert [i for shard in plan for i in shard.ids] == list(ids)
    assert all(shard.rows == size for shard in plan[:-1])
    assert all(shard.start == shard.index * size for shard in plan)
    assert len({shard.name for shard in plan}) == len(plan)


def test_the_identity_contains_the_recipe_and_the_properties_of_the_teacher(tmp_path) -> None:
    teacher = load_teacher_config(make_teacher(tmp_path / "teacher"))
    chosen = {name: OTHERS[name] for name in RolloutRecipe.model_fields if name in OTHERS}
    spec = RolloutSpec(teacher="there", store="here", guidance=(1.0,), compression="zstd", **chosen)
    identity = StoreIdentity.of(spec, teacher)
    assert {name: getattr(identity, name) for name in chosen} == chosen
    assert identity.teacher_sha256 == teacher.weights_sha256
    assert (identity.sample_shape, identity.class_frequencies) == (teacher.sample_shape, teacher.class_frequencies)
    assert (identity.path, identity.data_sha256) == (teacher.path, teacher.data_sha256)
    trajectory = StoreIdentity.of(spec.model_copy(update={"source": "trajectory"}), teacher)
    assert trajectory.data_sha256 is None  # only a forward rollout reads the data


def test_compilation_and_memory_format_are_not_part_of_the_identity(tmp_path) -> None:
    teacher = load_teacher_config(make_teacher(tmp_path / "teacher"))
    fast = Precision(compile=True, memory_format="channels_last")
    one, other = (
        StoreIdentity.of(RolloutSpec(teacher="there", store="here", precision=precision), teacher)
        for precision in (Precision(), fast)
    )
    assert one == other
    assert StoreIdentity(**{**IDENTITY, "precision": fast}).values() == StoreIdentity(**IDENTITY).values()


def test_the_fingerprints_of_stores_never_change() -> None:
    """If a fingerprint changed, existing stores and their students would be refused."""
    assert StoreIdentity(**IDENTITY).fingerprint() == "792bedd890ecbc24b2dcc9d7ca47080999b06fd6cd6b82066b10e6fd91f87fe2"
    assert (
        StoreIdentity(**{**IDENTITY, **OTHERS, "labels": "classes", **NEUTRAL}).fingerprint()
        == "46a9b48bf233d5df80bc82f4562c5a6eaca82b00b175fa25bd457f8f7000821d"
    )
