"""Frozen option models with one-line errors for users."""

import functools
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from kac.util.errors import ArgumentError, UnknownArgument, one_line

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

_is_outermost: ContextVar[bool] = ContextVar("_is_outermost", default=True)
"""False during validation, so that nested models do not raise errors of their own."""


class _Absent:
    """Hides a method of the metaclass from its classes."""

    def __get__(self, model: type, metaclass: type) -> Any:
        raise AttributeError("option models hide this method of abstract base classes")


class _Metaclass(ModelMetaclass):
    """Frees the name ``register`` for fields. Pydantic would use the metaclass's method as the field's default."""

    register = _Absent()


class Options(BaseModel, metaclass=_Metaclass):
    """A frozen set of named values. Unknown names and invalid values raise ``ArgumentError``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        is_outermost = _is_outermost.get()
        token = _is_outermost.set(False)
        try:
            super().__init__(**values)
        except ValidationError as error:
            if not is_outermost:  # pydantic adds the names of the outer fields
                raise
            entries = [dict(entry) for entry in error.errors()]
            kind = UnknownArgument if entries[0]["type"] == "extra_forbidden" else ArgumentError
            raise kind(_sentence(type(self), entries)) from None
        finally:
            _is_outermost.reset(token)

    @classmethod
    def model_validate(cls, *values: Any, **settings: Any) -> Self:
        """As pydantic's method; invalid values raise ``ArgumentError``."""
        with _unwrapped_errors():
            return super().model_validate(*values, **settings)

    @classmethod
    def model_validate_json(cls, *values: Any, **settings: Any) -> Self:
        """As pydantic's method; invalid values raise ``ArgumentError``."""
        with _unwrapped_errors():
            return super().model_validate_json(*values, **settings)

    @model_validator(mode="before")
    @classmethod
    def _parse_literals(cls, values: Any) -> Any:
        """Convert strings to non-string members of ``Literal`` types. Pydantic does this for all other types."""
        if not isinstance(values, dict):
            return values
        members = {name: _literals_by_text(cls, name) for name in values if name in cls.model_fields}
        return {name: _parse_literal(value, members.get(name, {})) for name, value in values.items()}


@contextmanager
def _unwrapped_errors() -> Iterator[None]:
    """Raise the ``ArgumentError`` of ``__init__``, which pydantic wraps because it is a ``ValueError``."""
    try:
        yield
    except ValidationError as error:
        cause = error.errors()[0].get("ctx", {}).get("error")
        raise (cause if isinstance(cause, ArgumentError) else error) from None


@functools.cache
def _literals_by_text(model: type[BaseModel], name: str) -> dict[str, Any]:
    """Return the non-string members of a field's ``Literal`` types, keyed by their string form."""

    def members(annotation: Any) -> list[Any]:
        parts = typing.get_args(annotation)
        if typing.get_origin(annotation) is Literal:
            return list(parts)
        return [member for part in parts for member in members(part)]

    return {str(member): member for member in members(model.model_fields[name].annotation) if type(member) is not str}


def _parse_literal(value: Any, members: Mapping[str, Any]) -> Any:
    if members and isinstance(value, list | tuple):
        return [_parse_literal(item, members) for item in value]
    return members.get(value, value) if isinstance(value, str) else value


class Kinded(Options):
    """A member of a union whose discriminator is ``kind``. ``"name"`` is short for ``{"kind": "name"}``."""

    @model_validator(mode="before")
    @classmethod
    def _expand_kind(cls, values: Any) -> Any:
        return expand_kind(values)


def expand_kind(values: Any) -> Any:
    """Expand ``"name"`` to ``{"kind": "name"}``: the ``BeforeValidator`` of a union whose discriminator is ``kind``."""
    return {"kind": values} if isinstance(values, str) else values


class OptionStyle(NamedTuple):
    """How a field appears on a command line, if not as ``--FIELD TYPE``: ``Annotated[bool, OptionStyle("json")]``."""

    name: str = ""
    metavar: str = ""
    positional: bool = False


@dataclass(frozen=True)
class Range:
    """The integers from ``least`` to ``most``, inclusive; written ``least:most``."""

    metavar: ClassVar[str] = "MIN:MAX"
    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}:{self.most}"


def as_count(value: Any) -> int | Range:
    """Parse ``N`` >= 0 or ``MIN:MAX`` with 1 <= MIN <= MAX; raises ``ValueError``."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", str(value).strip())
    if match and match[2] is None:
        return int(match[1])
    if match and 1 <= int(match[1]) <= int(match[2]):
        least, most = int(match[1]), int(match[2])
        return least if least == most else Range(least, most)
    raise ValueError(f"give a number N >= 0, or {Range.metavar} with 1 <= MIN <= MAX.")


Count = Annotated[
    int | Range,
    PlainValidator(as_count),
    PlainSerializer(lambda count: str(count) if isinstance(count, Range) else count),
]
"""A number, or a MIN:MAX range from which the largest number that fits is used."""


def least(count: int | Range) -> int:
    """Return the smallest number of a count."""
    return count.least if isinstance(count, Range) else count


def most(count: int | Range) -> int:
    """Return the largest number of a count."""
    return count.most if isinstance(count, Range) else count


def nested_models(field: FieldInfo | None) -> list[type[BaseModel]]:
    """Return the option models that a field can hold: one, the members of a union, or none."""
    if field is None:
        return []
    parts = typing.get_args(field.annotation) or (field.annotation,)
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values in one dictionary, under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


_MAPPING = "should be a mapping of names to values"
_PROBLEMS = {"model_type": _MAPPING, "model_attributes_type": _MAPPING, "tuple_type": "should be a list"}
"""Replacements for pydantic messages that name Python types."""


def _sentence(model: type[BaseModel], entries: list[dict[str, Any]]) -> str:
    """Describe the first of pydantic's errors in a sentence that names the argument."""
    entry = entries[0]
    where, kind, found = ".".join(_argument_names(model, entry["loc"])), entry["type"], entry["input"]
    context: dict[str, Any] = entry.get("ctx", {})
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        where, found = f"{where}.kind", context.get("tag")
    shown = one_line(repr(found), 100)  # an array given by mistake has many lines
    if kind == "extra_forbidden":
        return f"`{where}` is unknown. Check the spelling."
    if kind in {"missing", "union_tag_not_found"}:
        return f"`{where}` is required."
    if kind in {"value_error", "assertion_error"}:
        message = str(context.get("error", entry["msg"]))
        if message.startswith("`"):  # a nested model names the argument itself
            return f"`{where}.{message[1:]}" if where and isinstance(found, dict) else message
        return f"`{where}` is {shown}: {message}" if where else message
    if "expected_tags" in context:
        problem = f"be {' or '.join(context['expected_tags'].rsplit(', ', 1))}"
    else:  # a union of types has one error per type
        same = (other for other in entries if (other["loc"][:-1], other["input"]) == (entry["loc"][:-1], found))
        problem = " or ".join(dict.fromkeys(map(_problem, same))).replace(" or be ", " or ")
    return f"`{where}` is {shown}, but should {problem}."


def _problem(entry: dict[str, Any]) -> str:
    """Return what a value should be, without the reason: "Input should be a valid integer, unable to parse ..."."""
    message = _PROBLEMS.get(entry["type"], entry["msg"])
    return re.sub(r"^.*?should |, (unable|got) .*| after validation.*", "", message)


def _argument_names(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Return the argument names in an error's location, without the indices of tuples and the types of unions."""
    names, models, parts = [], [model], iter(location)
    for name in (part for part in parts if isinstance(part, str)):
        names.append(name)
        field = next((other.model_fields[name] for other in models if name in other.model_fields), None)
        if field is not None and field.discriminator:
            next(parts, None)
        models = nested_models(field)
        if field is not None and not models and typing.get_origin(field.annotation) is not dict:
            break
    return names
