"""Option models are frozen and refuse unknown fields. Every error is one line that names the argument and its value."""

import math
import pickle
from typing import Annotated, Literal

import pytest
from pydantic import BeforeValidator, Field, PositiveInt, ValidationError, field_validator, model_validator

from kac.util.errors import ArgumentError, DistillKacError
from kac.util.options import Options, number_of_text


class Inner(Options):
    width: PositiveInt = 8


class Outer(Options):
    out: str
    batch_size: PositiveInt = 32
    rate: float = Field(0.5, ge=0, lt=1)
    guidance: float = 0.0
    solver: Literal["euler", "ab2"] = "ab2"
    steps: tuple[PositiveInt, ...] = (1, 2)
    network: Inner = Inner()

    @model_validator(mode="after")
    def _solver_fits(self) -> "Outer":
        if self.solver == "euler" and self.batch_size == 1:
            raise ValueError("`batch_size` 1 is too small for euler.")
        return self


def test_values_are_converted_and_defaults_filled_in():
    options = Outer(out="somewhere", rate=0.25, network={"width": 3}, steps=[4, 5])
    assert options.model_dump() == {
        "out": "somewhere",
        "batch_size": 32,
        "rate": 0.25,
        "guidance": 0.0,
        "solver": "ab2",
        "steps": (4, 5),
        "network": {"width": 3},
    }
    assert isinstance(options.network, Inner)


@pytest.mark.parametrize(
    ("values", "name", "value"),
    [
        ({}, "out", "required"),
        ({"out": "a", "batchsize": 3}, "batchsize", "unknown"),
        ({"out": "a", "batch_size": 0}, "batch_size", "0"),
        ({"out": "a", "batch_size": "many"}, "batch_size", "'many'"),
        ({"out": "a", "rate": 1.0}, "rate", "1.0"),
        ({"out": "a", "guidance": math.nan}, "guidance", "nan"),
        ({"out": "a", "guidance": -math.inf}, "guidance", "-inf"),
        ({"out": "a", "solver": "rk4"}, "solver", "'rk4'"),
        ({"out": "a", "steps": [4, 0]}, "steps", "0"),
        ({"out": "a", "network": {"width": -1}}, "network.width", "-1"),
        ({"out": "a", "network": {"depth": 1}}, "network.depth", "unknown"),
        ({"out": "a", "solver": "euler", "batch_size": 1}, "batch_size", "euler"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [lambda v: Outer(**v), Outer.model_validate], ids=["call", "validate"])
def test_errors_name_the_argument_and_the_value(values, name, value, make):
    with pytest.raises(ArgumentError) as error:
        make(values)
    assert error.value.name == name
    assert value in str(error.value)
    assert "\n" not in str(error.value)


def test_argument_errors_are_errors_of_this_project():
    assert issubclass(ArgumentError, DistillKacError)


def test_options_are_frozen_and_hashable():
    options, same = Outer(out="a"), Outer(out="a")
    assert options == same != Outer(out="b")
    assert hash(options) == hash(same)
    with pytest.raises(ValidationError, match="frozen"):
        options.out = "b"


def test_options_and_their_errors_can_be_pickled():
    options = Outer(out="a", network=Inner(width=5))
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(ArgumentError) as error:
        Outer()
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_options_can_be_restored_from_json():
    options = Outer(out="a", steps=(7,), network=Inner(width=5))
    assert Outer(**options.model_dump(mode="json")) == options


def test_a_field_can_have_the_name_of_a_method_of_abstract_classes():
    class Named(Options):
        register: str | None = None

    class Later(Named):
        added: int = 0

    assert (Named().register, Later().register, Later(register="a").register) == (None, None, "a")


class Chosen(Options):
    side: Annotated[Literal[8, 16] | None, BeforeValidator(number_of_text)] = None
    scale: float | Literal["all"] = 0.0


def test_text_is_converted_to_members_of_a_literal():
    assert Chosen(side="8", scale="all") == Chosen(side=8, scale="all")
    with pytest.raises(ArgumentError, match=r"`side` is '9'|`side` is 9"):
        Chosen(side="9")


def test_the_error_about_a_union_names_the_field_and_all_types():
    with pytest.raises(ArgumentError, match=r"number or 'all'") as error:
        Chosen(scale="some")
    assert error.value.name == "scale"


class Mapped(Options):
    grid: dict[str, int] = Field({})

    @field_validator("grid")
    @classmethod
    def _has_rate(cls, grid: dict[str, int]) -> dict[str, int]:
        if "rate" not in grid:
            raise ValueError("`grid` needs rate.")
        return grid


class Nesting(Options):
    inner: Mapped = Mapped(grid={"rate": 1})


@pytest.mark.parametrize(
    ("make", "name"), [(Mapped, "grid"), (lambda grid: Nesting(inner={"grid": grid}), "inner.grid")]
)
def test_the_name_of_a_mapping_is_not_repeated(make, name):
    with pytest.raises(ArgumentError) as error:
        make(grid={"width": 1})
    assert error.value.name == name
