"""Fingerprints include the right fields, and an option added later does not change them."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BeforeValidator, Field, create_model

from kac.util.fingerprint import fingerprint, hashed_fields, hashed_values, unhashed, with_neutral_values
from kac.util.options import Kinded, Options


class Path(Kinded):
    kind: Literal["kac", "gaussian"] = "kac"
    a: float = 9.0


class Optimizer(Options):
    updates: int = 3000
    rate: float = 4e-3


class Spec(Options):
    teacher: str
    steps: int = 100
    path: Path = Path()
    optimizer: Optimizer = Optimizer(updates=2000)
    where: str = unhashed("here", "not hashed")


def test_only_fields_with_default_values_are_left_out():
    assert hashed_values(Spec(teacher="t")) == {"teacher": "t"}
    assert hashed_values(Spec(teacher="t", steps=50, where="there")) == {"teacher": "t", "steps": 50}


def test_a_group_has_its_changed_fields_and_always_its_kind():
    spec = Spec(teacher="t", path=Path(a=25.0), optimizer=Optimizer(updates=5))
    assert hashed_values(spec) == {"teacher": "t", "path": {"kind": "kac", "a": 25.0}, "optimizer": {"updates": 5}}
    # The neutral value of the group is the default of the stage, not the defaults of the group's fields.
    assert hashed_values(Spec(teacher="t", optimizer=Optimizer())) == {"teacher": "t", "optimizer": {}}


def test_different_options_have_different_fingerprints():
    different = [
        Spec(teacher="t"),
        Spec(teacher="u"),
        Spec(teacher="t", steps=50),
        Spec(teacher="t", optimizer=Optimizer()),
        Spec(teacher="t", optimizer=Optimizer(updates=2000, rate=1.0)),
        Spec(teacher="t", path=Path(kind="gaussian")),
        Spec(teacher="t", path=Path(a=1.0)),
    ]
    assert len({fingerprint(hashed_values(spec)) for spec in different}) == len(different)


def test_hashed_fields_include_neutral_values():
    assert hashed_fields(Spec(teacher="t")) == {
        "teacher": "t",
        "steps": 100,
        "path": {"kind": "kac", "a": 9.0},
        "optimizer": {"updates": 2000, "rate": 4e-3},
    }


class Features(Kinded):
    kind: Literal["pixels"] = "pixels"
    layers: int = 2


LATER: dict[str, Any] = {
    "number": (int, 7),
    "nothing": (int | None, None),
    "several": (tuple[float, ...], (1.0, 2.0)),
    "group": (Optimizer, Optimizer(rate=1.0)),
    "kinded_group": (Annotated[Features, BeforeValidator(lambda value: value)], Features(layers=3)),
}


@pytest.mark.parametrize("name", LATER)
def test_a_field_added_later_changes_no_fingerprint_until_it_is_used(name: str):
    later = create_model("Spec", __base__=Spec, **{name: LATER[name]})
    for values in ({"teacher": "t"}, {"teacher": "t", "steps": 3, "path": {"a": 2.0}}):
        assert hashed_values(later(**values)) == hashed_values(Spec(**values))
    used = {"number": 8, "nothing": 0, "several": (), "group": Optimizer(), "kinded_group": "pixels"}[name]
    assert name in hashed_values(later(teacher="t", **{name: used}))


def test_a_changed_default_keeps_the_fingerprint_of_old_values():
    changed = create_model("Spec", __base__=Spec, steps=(int, Field(50, json_schema_extra={"neutral": 100})))
    assert hashed_values(changed(teacher="t", steps=100)) == hashed_values(Spec(teacher="t", steps=100))
    assert hashed_values(changed(teacher="t")) == hashed_values(Spec(teacher="t", steps=50))


def test_stored_values_without_a_later_field_get_its_neutral_value():
    changed = create_model("Spec", __base__=Spec, later=(int, Field(7, json_schema_extra={"neutral": 1})))
    assert changed(**with_neutral_values(changed, {"teacher": "t"})).later == 1
    assert changed(**with_neutral_values(changed, {"teacher": "t", "later": 3})).later == 3


def test_a_fingerprint_is_the_sha256_of_sorted_json():
    assert fingerprint({"b": [1, 2.5], "a": None}) == fingerprint({"a": None, "b": [1, 2.5]})
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
