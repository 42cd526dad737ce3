"""Option models: frozen, closed, and every refusal is one line that names the option and the value."""

import math
import pickle
from typing import Literal

import pytest
from pydantic import Field, PositiveInt, ValidationError, model_validator

from kac.util.errors import ArgumentError, DistillKacError
from kac.util.options import Options


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
            raise ValueError("euler wants more than one")
        return self


def test_values_are_taken_and_defaults_filled_in():
    made = Outer(out="somewhere", rate=0.25, network={"width": 3}, steps=[4, 5])
    assert made.model_dump() == {
        "out": "somewhere",
        "batch_size": 32,
        "rate": 0.25,
        "guidance": 0.0,
        "solver": "ab2",
        "steps": (4, 5),
        "network": {"width": 3},
    }
    assert isinstance(made.network, Inner)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "`out`: expected a value, found none: see --help"),
        ({"out": "a", "batchsize": 3}, "`batchsize`: unknown option: see --help"),
        ({"out": "a", "batch_size": 0}, "`batch_size`: input should be greater than 0, found 0"),
        ({"out": "a", "batch_size": "many"}, "found 'many'"),
        ({"out": "a", "rate": 1.0}, "`rate`: input should be less than 1, found 1.0"),
        ({"out": "a", "guidance": math.nan}, "`guidance`: input should be a finite number, found nan"),
        ({"out": "a", "guidance": -math.inf}, "`guidance`: input should be a finite number, found -inf"),
        ({"out": "a", "solver": "rk4"}, "`solver`: input should be 'euler' or 'ab2', found 'rk4'"),
        ({"out": "a", "steps": [4, 0]}, "`steps`: input should be greater than 0, found 0"),
        ({"out": "a", "network": {"width": -1}}, "`network.width`: input should be greater than 0, found -1"),
        ({"out": "a", "network": {"depth": 1}}, "`network.depth`: unknown option"),
        ({"out": "a", "solver": "euler", "batch_size": 1}, "euler wants more than one"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [lambda v: Outer(**v), Outer.model_validate], ids=["call", "validate"])
def test_refusals_name_the_option_and_the_value(values, message, make):
    with pytest.raises(ArgumentError) as error:
        make(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_refusals_are_those_of_the_project():
    assert issubclass(ArgumentError, DistillKacError)


def test_options_are_frozen_values():
    made, same = Outer(out="a"), Outer(out="a")
    assert made == same != Outer(out="b")
    assert hash(made) == hash(same)
    with pytest.raises(ValidationError, match="frozen"):
        made.out = "b"


def test_options_and_their_refusals_travel_between_processes():
    made = Outer(out="a", network=Inner(width=5))
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(ArgumentError) as error:
        Outer()
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_a_dump_makes_the_same_options_again():
    made = Outer(out="a", steps=(7,), network=Inner(width=5))
    assert Outer(**made.model_dump(mode="json")) == made


def test_a_field_may_have_the_name_of_a_method_of_abstract_classes():
    class Named(Options):
        register: str | None = None

    class Later(Named):
        added: int = 0

    assert (Named().register, Later().register, Later(register="a").register) == (None, None, "a")


class Chosen(Options):
    side: Literal[8, 16] | None = None
    sides: tuple[Literal[8, 16], ...] = ()
    scale: float | Literal["all"] = 0.0


def test_words_are_members_of_a_literal():
    made = Chosen(side="8", sides=["16", 8], scale="all")
    assert (made.side, made.sides, made.scale) == (8, (16, 8), "all")
    with pytest.raises(ArgumentError, match=r"`side`: .*found '9'"):
        Chosen(side="9")
