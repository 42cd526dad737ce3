"""Options that name files and folders: outputs are apart from inputs, and no file is given for a folder."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from kac.util import files
from kac.util.errors import ArgumentError, DistillKacError
from kac.util.fingerprint import unhashed

Paths = Mapping[str, str | Iterable[str] | None]
"""Paths by the options that give them."""

Parts = tuple[str, ...]

PathKind = Literal["file", "folder", "any"]


class _Given(NamedTuple):
    """A path, and the option that gives it."""

    option: str
    path: str
    kind: PathKind = "any"


def input_path(
    default: Any, description: str, kind: PathKind = "folder", pattern: str = ".+", **constraints: Any
) -> Any:
    """A field that names a file or folder to read, or several of them.

    Args:
        kind: what must be at the path.
        pattern: a regular expression that matches a whole value if it is a path; other values are words.
    """
    return unhashed(default, description, marks=reads(kind, pattern), **constraints)


def output_path(default: Any, description: str, kind: PathKind = "folder") -> Any:
    """A field that names the file or folder to write."""
    return unhashed(default, description, marks={"writes": ".+", "path_kind": kind})


def reads(kind: PathKind = "folder", pattern: str = ".+") -> dict[str, Any]:
    """The marks of an ``input_path``, for a field that enters the fingerprint."""
    return {"reads": pattern, "path_kind": kind}


def check_kinds(options: BaseModel) -> None:
    """Refuse a file where a folder is expected, and a folder where a file is expected. Only disks are looked at.

    Raises:
        ArgumentError: the first such path.
    """
    for option, path, kind in (*_marked(options, "reads"), *_marked(options, "writes")):
        name = files.normal(path)
        if files.is_uri(name):
            continue
        above = next(folder for folder in Path(os.getcwd(), name).parents if os.path.exists(folder))
        if os.path.isfile(above):
            raise ArgumentError(f"{option} {path}: {above} is a file, so nothing can be below it. Give another path.")
        if kind == "folder" and os.path.isfile(name):
            raise ArgumentError(f"{option} {path} is a file. Give a folder.")
        if kind == "file" and os.path.isdir(name):
            raise ArgumentError(f"{option} {path} is a folder. Give a file.")


def check_apart(options: BaseModel, derived: Paths | None = None) -> None:
    """Refuse an output that is an input, is inside an input, or contains one: writing it would damage the input.

    Args:
        derived: inputs that no option names, such as the data of a teacher.

    Raises:
        ArgumentError: the first such pair.
    """
    for given in _marked(options, "writes"):
        check_output(given.option, given.path, options, derived)


def check_output(option: str, path: str, options: BaseModel, derived: Paths | None = None) -> None:
    """Refuse one output, as ``check_apart`` does."""
    for given, read, _ in [*_marked(options, "reads"), *_each(derived or {})]:
        if relation := _relation(_names(option, path), _names(given, read)):
            raise ArgumentError(
                f"{option} {_shown(path)} {relation} {given} {_shown(read)}, and writing there would damage this "
                f"input. Choose another {option}."
            )


def _marked(options: BaseModel, mark: str, prefix: str = "") -> Iterator[_Given]:
    """Every path of the fields with this mark, and the option that gives it."""
    for name, field in type(options).model_fields.items():
        # An option may have another name than its field.
        words = [str(given) for each in field.metadata if (given := getattr(each, "name", None))]
        value, option = getattr(options, name), prefix + [name, *words][-1]
        extra: Any = field.json_schema_extra
        if isinstance(value, BaseModel):
            yield from _marked(value, mark, f"{option}.")
        elif extra and mark in extra:
            for given in _each({f"`{option}`": value}):
                if re.fullmatch(str(extra[mark]), given.path, re.DOTALL):
                    yield given._replace(kind=extra["path_kind"])


def _each(paths: Paths) -> Iterator[_Given]:
    for option, given in paths.items():
        for path in [given] if isinstance(given, str) else given or []:
            yield _Given(option, path)


def _names(option: str, path: str) -> set[Parts]:
    """The parts of the names of a path: that of the place it leads to, and that of a link at its end."""
    try:
        name = files.normal(path)
    except DistillKacError as error:
        raise ArgumentError(f"{option}: {error}") from None
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
