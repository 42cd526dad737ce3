"""Frozen option models whose errors are one line for the person who gave the options."""

import functools
import re
import typing
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from kac.util.errors import ArgumentError, UnknownArgument

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

_is_outermost: ContextVar[bool] = ContextVar("_is_outermost", default=True)
"""False while the values of a model are checked, those of the models in it too."""


class _Absent:
    """An attribute of the metaclass that a class does not seem to have, unless it is its own."""

    def __get__(self, model: type, metaclass: type) -> Any:
        raise AttributeError("a method of abstract base classes, which option models have no use for")


class _Metaclass(ModelMetaclass):
    """Frees the names of its methods for fields: pydantic would take a method for a field's default."""

    register = _Absent()


class Options(BaseModel, metaclass=_Metaclass):
    """A frozen set of named values; unknown names and values out of range raise ``ArgumentError``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        is_outermost = _is_outermost.get()
        token = _is_outermost.set(False)
        try:
            super().__init__(**values)
        except ValidationError as error:
            if not is_outermost:  # pydantic adds the names of the options on the way here
                raise
            entry = dict(error.errors()[0])
            kind = UnknownArgument if entry["type"] == "extra_forbidden" else ArgumentError
            raise kind(_sentence(type(self), entry)) from None
        finally:
            _is_outermost.reset(token)

    @model_validator(mode="before")
    @classmethod
    def _literals_from_words(cls, values: Any) -> Any:
        """Words of a command line or a grid as members of a ``Literal``; pydantic converts words to other types."""
        if not isinstance(values, dict):
            return values
        spelled = {name: _spelled_literals(cls, name) for name in values if name in cls.model_fields}
        return {name: _from_words(value, spelled.get(name, {})) for name, value in values.items()}


@functools.cache
def _spelled_literals(model: type[BaseModel], name: str) -> dict[str, Any]:
    """The members of a field's ``Literal`` types that are not text, by their spelling."""

    def members(annotation: Any) -> list[Any]:
        parts = typing.get_args(annotation)
        if typing.get_origin(annotation) is Literal:
            return list(parts)
        return [member for part in parts for member in members(part)]

    return {str(member): member for member in members(model.model_fields[name].annotation) if type(member) is not str}


def _from_words(value: Any, spelled: Mapping[str, Any]) -> Any:
    if spelled and isinstance(value, list | tuple):
        return [_from_words(each, spelled) for each in value]
    return spelled.get(value, value) if isinstance(value, str) else value


class Kinded(Options):
    """Options told apart by their field ``kind``; if the rest may stay at its defaults, the kind alone is enough."""

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, values: Any) -> Any:
        return kind_alone(values)


def kind_alone(values: Any) -> Any:
    """A kind as the values of that kind: the ``BeforeValidator`` of a union whose discriminator is ``kind``."""
    return {"kind": values} if isinstance(values, str) else values


@dataclass(frozen=True)
class Range:
    """From ``least`` to ``most``, both included; written ``least:most``."""

    metavar: ClassVar[str] = "MIN:MAX"
    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}:{self.most}"


def as_count(given: Any) -> int | Range:
    """A number from 0 on, or a range from 1 on; raises ``ValueError``."""
    if isinstance(given, Range):
        given = str(given)
    match = re.fullmatch(r"(\d+)(?::(\d+))?", str(given).strip())
    if match and match[2] is None:
        return int(match[1])
    if match and 1 <= int(match[1]) <= int(match[2]):
        least, most = int(match[1]), int(match[2])
        return least if least == most else Range(least, most)
    raise ValueError(f"expected a number N from 0 on, or {Range.metavar} with 1 <= MIN <= MAX")


Count = Annotated[
    int | Range,
    PlainValidator(as_count),
    PlainSerializer(lambda count: str(count) if isinstance(count, Range) else count),
]
"""How many there are of something: so many, or as many of a range as there is room for."""


def least(count: int | Range) -> int:
    """The fewest that will do."""
    return count.least if isinstance(count, Range) else count


def most(count: int | Range) -> int:
    """The most that there may be."""
    return count.most if isinstance(count, Range) else count


def nested_models(field: FieldInfo | None) -> list[type[BaseModel]]:
    """The option models that a field may hold: none, one, or those of a union; none without a field."""
    if field is None:
        return []
    parts = typing.get_args(field.annotation) or (field.annotation,)
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


_NAMED_VALUES = "should be named values"
_PROBLEMS = {"model_type": _NAMED_VALUES, "model_attributes_type": _NAMED_VALUES, "tuple_type": "should be a list"}
"""Replacements for what pydantic says about Python's types."""


def _sentence(model: type[BaseModel], entry: dict[str, Any]) -> str:
    where, kind, found = ".".join(_names(model, entry["loc"])), entry["type"], entry["input"]
    context: dict[str, Any] = entry.get("ctx", {})
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        where, found = f"{where}.kind", context.get("tag")
    if kind == "extra_forbidden":
        return f"`{where}` is unknown. Check the spelling."
    if kind in {"missing", "union_tag_not_found"}:
        return f"`{where}` is required."
    if kind in {"value_error", "assertion_error"}:
        message = str(context.get("error", entry["msg"]))
        if message.startswith("`"):  # the check of a nested model names its own arguments
            return f"`{where}.{message[1:]}" if where and isinstance(found, dict) else message
        return f"`{where}` is {found!r}: {message}" if where else message
    problem = f"should be {context['expected_tags']}" if "expected_tags" in context else _PROBLEMS.get(kind)
    problem = problem or entry["msg"].removeprefix("Input ")
    return f"`{where}` is {found!r}, but {problem}."


def _names(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The names of the options on the way to an error, without places in tuples and the tags of unions."""
    names, models, parts = [], [model], iter(location)
    for name in (part for part in parts if isinstance(part, str)):
        names.append(name)
        field = next((other.model_fields[name] for other in models if name in other.model_fields), None)
        if field is not None and field.discriminator:
            next(parts, None)
        models = nested_models(field)
    return names
