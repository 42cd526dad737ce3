"""Frozen option models, whose errors are one line for the user."""

import functools
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError, model_validator
from pydantic.fields import FieldInfo

from kac.util.errors import ArgumentError, UnknownArgument, one_line

_is_outermost: ContextVar[bool] = ContextVar("_is_outermost", default=True)  # only the outermost model converts errors


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _Metaclass(ModelMetaclass):
    """Allows fields named ``register``. Otherwise, their default would be the method ``ABCMeta.register``."""

    @functools.cached_property  # a field's default can override this, but not a plain property
    def register(self) -> Any:
        raise AttributeError("register")


class Options(BaseModel, metaclass=_Metaclass):
    """A frozen set of named values. Unknown names and invalid values raise ``ArgumentError``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        with _argument_errors(type(self)):
            super().__init__(**values)

    @classmethod
    def model_validate(cls, *values: Any, **settings: Any) -> Self:
        """Validate like pydantic's method, but raise ``ArgumentError`` for invalid values."""
        with _argument_errors(cls):
            return super().model_validate(*values, **settings)

    @classmethod
    def model_validate_json(cls, *values: Any, **settings: Any) -> Self:
        """Validate like pydantic's method, but raise ``ArgumentError`` for invalid values."""
        with _argument_errors(cls):
            return super().model_validate_json(*values, **settings)


@contextmanager
def _argument_errors(model: type[BaseModel]) -> Iterator[None]:
    is_outermost = _is_outermost.get()
    token = _is_outermost.set(False)
    try:
        yield
    except ValidationError as error:
        if not is_outermost:  # pydantic adds the names of the outer fields
            raise
        entries = [dict(entry) for entry in error.errors()]
        kind = UnknownArgument if entries[0]["type"] == "extra_forbidden" else ArgumentError
        raise kind(_sentence(model, entries)) from None
    finally:
        _is_outermost.reset(token)


class Kinded(Options):
    """A member of a union whose discriminator is ``kind``. ``"name"`` is short for ``{"kind": "name"}``."""

    @model_validator(mode="before")
    @classmethod
    def _expand_kind(cls, values: Any) -> Any:
        return expand_kind(values)


def expand_kind(values: Any) -> Any:
    """Expand ``"name"`` to ``{"kind": "name"}``. A ``BeforeValidator`` for unions whose discriminator is ``kind``."""
    return {"kind": values} if isinstance(values, str) else values


def number_of_text(value: Any) -> Any:
    """Convert a string of digits to an integer. A ``BeforeValidator`` for a ``Literal`` of integers."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class OptionStyle(NamedTuple):
    """How a field appears on the command line, if not as ``--FIELD TYPE``: ``Annotated[bool, OptionStyle("json")]``."""

    name: str = ""
    metavar: str = ""
    positional: bool = False


@dataclass(frozen=True)
class Range:
    """The integers from ``least`` to ``most``, inclusive, written as ``least:most``."""

    metavar: ClassVar[str] = "MIN:MAX"
    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}:{self.most}"


def as_count(value: Any) -> int | Range:
    """Parse ``N`` >= 0 or ``MIN:MAX`` with 1 <= MIN <= MAX. Raises ``ValueError`` for other values."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", str(value).strip())
    if match:
        least, most = int(match[1]), int(match[2] or match[1])
        if match[2] is None or least == most > 0:
            return least
        if 1 <= least <= most:
            return Range(least, most)
    raise ValueError(f"give a number N >= 0, or {Range.metavar} with 1 <= MIN <= MAX.")


Count = Annotated[
    int | Range,
    PlainValidator(as_count),
    PlainSerializer(lambda count: str(count) if isinstance(count, Range) else count),
]
"""A number, or a MIN:MAX range. A job uses the largest number in the range for which it finds resources."""


def least(count: int | Range) -> int:
    """Return ``count`` if it is a number, or its minimum if it is a range."""
    return count.least if isinstance(count, Range) else count


def most(count: int | Range) -> int:
    """Return ``count`` if it is a number, or its maximum if it is a range."""
    return count.most if isinstance(count, Range) else count


def nested_models(field: FieldInfo | None) -> list[type[BaseModel]]:
    """Return the option models in a field's type: one model, the members of a union, or none."""
    if field is None:
        return []
    parts = typing.get_args(field.annotation) or (field.annotation,)
    return [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values into one dictionary with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


# Replacements for pydantic messages that name Python types
_MAPPING = "should be a mapping of names to values"
_PROBLEMS = {"model_type": _MAPPING, "model_attributes_type": _MAPPING, "tuple_type": "should be a list"}


def _sentence(model: type[BaseModel], entries: list[dict[str, Any]]) -> str:
    """Describe the first of pydantic's errors in a sentence that names the argument."""
    entry = entries[0]
    names, is_nested = _argument_names(model, entry["loc"])
    where, kind, found = ".".join(names), entry["type"], entry["input"]
    context: dict[str, Any] = entry.get("ctx", {})
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        where, found = f"{where}.kind", context.get("tag")
    shown = one_line(repr(found), 100)  # if the value is an array, its repr has many lines
    if kind == "extra_forbidden":
        return f"`{where}` is unknown. Check the spelling."
    if kind in {"missing", "union_tag_not_found"}:
        return f"`{where}` is required."
    if kind in {"value_error", "assertion_error"}:
        message = str(context.get("error", entry["msg"]))
        if message.startswith("`"):  # our validators name the argument, but do not know the outer names
            outer = names if is_nested else names[:-1]
            return f"`{'.'.join([*outer, message[1:]])}"
        return f"`{where}` is {shown}: {message}" if where else message
    if not where:
        return f"{entry['msg']}."
    if "expected_tags" in context:
        problem = f"be {' or '.join(context['expected_tags'].rsplit(', ', 1))}"
    else:  # for a union of types, pydantic reports one error per type
        same = (other for other in entries if (other["loc"][:-1], other["input"]) == (entry["loc"][:-1], found))
        problem = " or ".join(dict.fromkeys(map(_problem, same))).replace(" or be ", " or ")
    return f"`{where}` is {shown}, but should {problem}."


def _problem(entry: dict[str, Any]) -> str:
    """Return what a value should be, from a text like "Input should be a valid integer, unable to parse ..."."""
    message = _PROBLEMS.get(entry["type"], entry["msg"])
    return re.sub(r"^.*?should |, (unable|got) .*| after validation.*", "", message)


def _argument_names(model: type[BaseModel], location: tuple[str | int, ...]) -> tuple[list[str], bool]:
    """Return the argument names in an error's location, without indices and types, and whether the last is a model."""
    names, models, parts = [], [model], iter(location)
    for name in (part for part in parts if isinstance(part, str)):
        names.append(name)
        field = next((other.model_fields[name] for other in models if name in other.model_fields), None)
        if field is not None and field.discriminator:
            next(parts, None)
        models = nested_models(field)
        if field is not None and not models and typing.get_origin(field.annotation) is not dict:
            break
    return names, bool(names and models)
