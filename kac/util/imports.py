"""Import user code by its import path, ``package.module:factory``."""

import ast
import contextlib
import importlib
import json
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator
from torch import nn

from kac.util.errors import ArgumentError, one_line

Result = TypeVar("Result")

IMPORT_PATH = re.compile(r"[\w.]+:\w+")
"""The syntax of an import path."""


def build(
    option: str,
    given: str,
    wanted: type[Result],
    arguments: Mapping[str, Any] | None = None,
    needs_annotation: bool = True,
) -> Result:
    """Import a factory by its import path, call it, and return the object that it builds.

    Args:
        option: the argument in backquotes, for error messages.
        wanted: the type of the object to build.
        arguments: the factory's keyword arguments.
        needs_annotation: refuse a factory that is neither a ``wanted`` class nor a function annotated to return one.
            This keeps the config.json of an untrusted model folder from calling arbitrary functions.

    Raises:
        ArgumentError: the import fails, or the factory lacks the annotation, fails, or returns the wrong type.
    """
    module, _, name = given.partition(":")
    try:
        factory: Any = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ArgumentError(
            f"{option} {given} cannot be imported ({describe_exception(error)}). Give package.module:factory, "
            "where the module is installed or in the working directory."
        ) from error
    type_name = "nn.Module" if wanted is nn.Module else wanted.__name__
    if needs_annotation and not _is_annotated(factory, wanted):
        raise ArgumentError(
            f"{option} {given} is neither an {type_name} class nor a function annotated to return one. Annotate the "
            f"function: def factory(...) -> {type_name}."
        )
    try:
        result = factory(**arguments or {})
    except Exception as error:
        raise ArgumentError(f"{option} {given} raised {describe_exception(error)}.") from error
    if not isinstance(result, wanted):
        raise ArgumentError(f"{option} {given} returned {type(result).__name__}. It should return an {type_name}.")
    return result


def describe_exception(error: Exception) -> str:
    """Return an exception's type and text on one line, without a final period."""
    text = one_line(error).rstrip(".")
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"


def _is_annotated(factory: Any, wanted: type) -> bool:
    try:
        result = factory if isinstance(factory, type) else typing.get_type_hints(factory).get("return")
    except (TypeError, NameError, AttributeError):
        return False
    return isinstance(result, type) and issubclass(result, wanted)


def _check_import_path(path: str) -> str:
    if not IMPORT_PATH.fullmatch(path):
        raise ValueError("write it as package.module:factory.")
    return path


def _parse_words(given: Any) -> Any:
    """Parse words of the form NAME=VALUE. VALUE is JSON, a Python literal or other text."""
    if not isinstance(given, list | tuple):
        return given
    arguments = {}
    for word in given:
        name, equals, text = str(word).partition("=")
        if not equals or not name.isidentifier():
            raise ValueError("write each argument as NAME=VALUE.")
        if name in arguments:
            raise ValueError(f"{name} is given twice.")
        arguments[name] = text
        for parse in (ast.literal_eval, json.loads):
            with contextlib.suppress(ValueError, SyntaxError):
                arguments[name] = parse(text)
        if arguments[name] == text and text[:1] in {"[", "{", "("}:
            raise ValueError("write lists and mappings as JSON.")
    return arguments


def _as_plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Convert the arguments to JSON and back, because a model folder stores them in config.json."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(arguments, allow_nan=False))
    except (TypeError, ValueError):
        raise ValueError("values must be numbers, text, true, false, null, or lists and mappings of these.") from None
    return plain


ImportPath = Annotated[str, AfterValidator(_check_import_path)]
"""The type of a field that holds a factory's import path."""

FactoryArguments = Annotated[dict[str, Any], BeforeValidator(_parse_words), AfterValidator(_as_plain)]
"""The type of a field that holds a factory's keyword arguments: a mapping, or words of the form NAME=VALUE."""

ARGUMENTS_HELP = "the factory's keyword arguments as NAME=VALUE: width=64 levels=[1,2] name=abc flag=true"
