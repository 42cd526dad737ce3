"""Options that name what a stage reads and what it writes, and the check that both are apart."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from kac import files
from kac.errors import DistillKacError
from kac.fingerprint import unhashed
from kac.options import OptionError

Paths = Mapping[str, str | Iterable[str] | None]
"""Paths by the options that give them."""

Parts = tuple[str, ...]


def input_path(default: Any, description: str, pattern: str = ".+", **constraints: Any) -> Any:
    """A field that names a file or folder to read, or several of them.

    Args:
        pattern: a regular expression that matches a whole value if it is a path; other values are words.
    """
    return unhashed(default, description, marks=reads(pattern), **constraints)


def output_path(default: Any, description: str) -> Any:
    """A field that names the file or folder to write."""
    return unhashed(default, description, marks={"writes": ".+"})


def reads(pattern: str = ".+") -> dict[str, Any]:
    """The mark of an ``input_path``, for a field that enters the fingerprint."""
    return {"reads": pattern}


def check_apart(options: BaseModel, derived: Paths | None = None) -> None:
    """Refuse an output that is an input, is inside an input, or contains one: writing it would damage the input.

    Args:
        derived: inputs that no option names, such as the data of a teacher.

    Raises:
        OptionError: the first such pair.
    """
    for option, path in _marked(options, "writes"):
        check_output(option, path, options, derived)


def check_output(option: str, path: str, options: BaseModel, derived: Paths | None = None) -> None:
    """Refuse one output, as ``check_apart`` does."""
    for given, read in [*_marked(options, "reads"), *_each(derived or {})]:
        if relation := _relation(_names(option, path), _names(given, read)):
            raise OptionError(
                f"{option} {_shown(path)} {relation} {given} {_shown(read)}, and writing there would damage this "
                f"input. Choose another {option}."
            )


def _marked(options: BaseModel, mark: str, prefix: str = "--") -> Iterator[tuple[str, str]]:
    """Every path of the fields with this mark, and the option that gives it."""
    for name, field in type(options).model_fields.items():
        value, option = getattr(options, name), f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, BaseModel):
            yield from _marked(value, mark, f"{option}.")
        elif isinstance(field.json_schema_extra, dict) and mark in field.json_schema_extra:
            pattern = str(field.json_schema_extra[mark])
            yield from (pair for pair in _each({option: value}) if re.fullmatch(pattern, pair[1], re.DOTALL))


def _each(paths: Paths) -> Iterator[tuple[str, str]]:
    for option, given in paths.items():
        for path in [given] if isinstance(given, str) else given or []:
            yield option, path


def _names(option: str, path: str) -> set[Parts]:
    """The parts of the names of a path: that of the place it leads to, and that of a link at its end."""
    try:
        name = files.normal(path)
    except DistillKacError as error:
        raise OptionError(f"{option}: {error}") from None
    if files.is_uri(name):
        return {tuple(name.split("/"))}
    folder, last = os.path.split(os.path.abspath(name) if name in {".", "/"} else os.path.join(os.getcwd(), name))
    return {_parts(os.path.realpath(name)), _parts(os.path.join(os.path.realpath(folder), last))}


def _parts(path: str) -> Parts:
    return ("/", *os.path.normpath(path).strip("/").split("/")) if path.strip("/") else ("/",)


def _relation(written: set[Parts], read: set[Parts]) -> str:
    """How one path lies to another; empty if they are apart."""
    pairs = [(one, other) for one in written for other in read]
    if any(one == other for one, other in pairs):
        return "is the same place as"
    if any(one[: len(other)] == other for one, other in pairs):
        return "is inside"
    return "contains" if any(other[: len(one)] == one for one, other in pairs) else ""


def _shown(path: str) -> str:
    """The path as it was given, and the one that it leads to if links are on the way."""
    name = files.normal(path)
    if files.is_uri(name) or os.path.realpath(name) == os.path.abspath(name):
        return path
    return f"{path} ({os.path.realpath(name)})"
