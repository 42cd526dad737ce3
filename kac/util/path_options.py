"""Fields for paths, with two checks: a path is a file or a folder as required, and outputs do not overlap inputs."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

from pydantic import BaseModel

from kac.util import files
from kac.util.errors import ArgumentError, DistillKacError
from kac.util.fingerprint import unhashed
from kac.util.options import OptionStyle

Paths = Mapping[str, str | Iterable[str] | None]
"""Paths, keyed by an argument name in backquotes or by a description."""

PathKind = Literal["file", "folder", "any"]


def input_path(
    default: Any, description: str, kind: PathKind = "folder", pattern: str = ".+", **constraints: Any
) -> Any:
    """Return a field for one or several paths of files or folders to read.

    A value counts as a path only if the whole value matches the regular expression ``pattern``.
    """
    return unhashed(default, description, marks=reads(kind, pattern), **constraints)


def output_path(default: Any, description: str, kind: PathKind = "folder") -> Any:
    """Return a field for the path of a file or folder to write."""
    return unhashed(default, description, marks={"writes": ".+", "path_kind": kind})


def reads(kind: PathKind = "folder", pattern: str = ".+") -> dict[str, Any]:
    """Return the marks that ``input_path`` sets. Use them for a path that is part of the fingerprint."""
    return {"reads": pattern, "path_kind": kind}


def check_kinds(options: BaseModel) -> None:
    """Raise ``ArgumentError`` if a local path is a file where a folder is required, or the reverse."""
    for option, path, kind in (*_marked(options, "reads"), *_marked(options, "writes")):
        name = files.normal(path)
        if files.is_uri(name):
            continue
        parent = next(folder for folder in Path(os.getcwd(), name).parents if os.path.exists(folder))
        if os.path.isfile(parent):
            raise ArgumentError(f"{option} {path} is below {parent}, which is a file. Give another path.")
        if kind == "folder" and os.path.isfile(name):
            raise ArgumentError(f"{option} {path} is a file. Give a folder.")
        if kind == "file" and os.path.isdir(name):
            raise ArgumentError(f"{option} {path} is a folder. Give a file.")


def check_apart(options: BaseModel, derived: Paths | None = None) -> None:
    """Raise ``ArgumentError`` if an output is an input, is inside an input or contains an input.

    Writing such an output would damage the input. ``derived`` holds inputs that are not options, such as the data.
    """
    for option, path, _ in _marked(options, "writes"):
        check_output(option, path, options, derived)


def check_output(option: str, path: str, options: BaseModel, derived: Paths | None = None) -> None:
    """Check one output as ``check_apart`` does."""
    inputs = [(other, read) for other, read, _ in _marked(options, "reads")]
    inputs += [(other, read) for other, value in (derived or {}).items() for read in _paths(value)]
    for other, read in inputs:
        if relation := _relation(_resolve(option, path), _resolve(other, read)):
            raise ArgumentError(
                f"{option} {_describe(path)} {relation} {other} {_describe(read)}, so writing the output would damage "
                f"the input. Choose another {option}."
            )


def _marked(options: BaseModel, mark: str, prefix: str = "") -> Iterator[tuple[str, str, PathKind]]:
    """Yield the option, path and kind of each path in the fields with this mark."""
    for name, field in type(options).model_fields.items():
        styles = [style.name for style in field.metadata if isinstance(style, OptionStyle) and style.name]
        value, option = getattr(options, name), f"{prefix}{[name, *styles][-1]}"
        extra: Any = field.json_schema_extra or {}
        if isinstance(value, BaseModel):
            yield from _marked(value, mark, f"{option}.")
        elif mark in extra:
            for path in _paths(value):
                if re.fullmatch(str(extra[mark]), path, re.DOTALL):
                    yield f"`{option}`", path, extra["path_kind"]


def _paths(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _resolve(option: str, path: str) -> set[PurePath]:
    """Return two forms of a path: with all links resolved, and with all but a link at its end resolved."""
    try:
        name = files.normal(path)
    except DistillKacError as error:
        raise ArgumentError(f"{option} is invalid. {error}") from None
    if files.is_uri(name):
        return {PurePath(name)}
    folder, last = os.path.split(os.path.abspath(name) if name in {".", "/"} else os.path.join(os.getcwd(), name))
    return {PurePath(os.path.realpath(name)), PurePath(os.path.normpath(os.path.join(os.path.realpath(folder), last)))}


def _relation(written: set[PurePath], read: set[PurePath]) -> str:
    """Return how two paths overlap, or an empty string."""
    pairs = [(one, other) for one in written for other in read]
    if any(one == other for one, other in pairs):
        return "is the same path as"
    if any(one.is_relative_to(other) for one, other in pairs):
        return "is inside"
    return "contains" if any(other.is_relative_to(one) for one, other in pairs) else ""


def _describe(path: str) -> str:
    """Return the path. If it contains links, its target follows in parentheses."""
    name = files.normal(path)
    if files.is_uri(name) or os.path.realpath(name) == os.path.abspath(name):
        return path
    return f"{path} ({os.path.realpath(name)})"
