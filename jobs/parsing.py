"""Parse a command line and an options file into a spec.

argparse splits the command line and formats the help. Values stay text until pydantic validates the command
line and the file together. An invalid value therefore gives the same error in either place.
"""

import argparse
import difflib
import re
import typing
from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jobs.config_files import Values, read_options, recipe_names
from kac.util.errors import ArgumentError, UnknownArgument, as_options
from kac.util.options import OptionStyle, expand_kind, nested_models
from pipeline.config import Spec

SpecType = TypeVar("SpecType", bound=Spec)

CONFIG: Any = Field(
    None,
    description=f"recipe ({', '.join(recipe_names())}) or YAML file of options; options on the command line override "
    "it; default: no file",
)
CONFIG.annotation, CONFIG.metadata = str, [OptionStyle(metavar="RECIPE|FILE.yaml")]


class Option(NamedTuple):
    """A spec's field, shown as a command-line option. A positional field has no names."""

    names: tuple[str, ...]
    path: tuple[str, ...]  # names of the nested fields that lead to the value
    can_be_none: bool
    nargs: Literal["0", "1", "?", "*", "+"]  # number of words, as in argparse
    metavar: str
    help: str
    section: str  # section of the help; empty for the first section


def parse(spec_type: type[SpecType], arguments: list[str], prog: str) -> SpecType:
    """Return the spec that the arguments describe. Options override the values of the ``--config`` file.

    If an option has several kinds, the chosen kind has its own options: ``--network mlp --network.width 64``.

    Raises:
        ArgumentError: an option of the command line or the file is unknown, missing or invalid.
    """
    # The first pass finds only the file and the kinds. They determine which options the second pass accepts.
    first, _ = _read(_options([spec_type], _with_defaults(spec_type, {})), arguments)
    configs = first.get("config", [])
    if len(configs) > 1:
        raise ArgumentError("`config` is given twice. Put all options into one file.")
    path = configs[0] if configs else None
    file = {} if path is None else read_options(path, spec_type)
    options = [*_options([spec_type], _with_defaults(spec_type, _override(file, _kinds(first))))]
    given, unknown = _read(options, arguments)
    if given.pop("help", False):
        print(_parser(options, spec_type, prog).format_help(), end="")
        raise SystemExit(0)
    if unknown:
        raise ArgumentError(_describe_unknown(unknown[0], options))
    given.pop("config", None)
    values = _with_defaults(spec_type, _override(file, given))
    for option in options:
        if not option.names and not values.get(option.path[0]):
            raise ArgumentError(f"{option.path[0].upper()} is required. See --help.")
    try:
        return spec_type(**values)
    except UnknownArgument as error:  # the unknown option is in the file, because the command line was checked
        raise ArgumentError(f"`config` {path}: {error}") from None


def _read(options: Iterable[Option], arguments: list[str]) -> tuple[Values, list[str]]:
    """Return the given values, nested as in the spec, and the words that belong to no option."""
    options = [*options]
    words = [re.sub("^--[^=]+", lambda name: _kebab(name[0]), word) for word in arguments]
    try:
        namespace, unknown = _parser(options).parse_known_intermixed_args(words)
    except argparse.ArgumentError as error:
        problem = "takes no value" if "explicit argument" in error.message else "needs a value"
        raise ArgumentError(f"{error.argument_name} {problem}. See --help.") from None
    given = vars(namespace)
    values: Values = {"help": True} if given.get("help") else {}
    for option in options:
        value = given.get(".".join(option.path))
        if value is not None:
            _put(values, option.path, None if option.can_be_none and value in ("None", ["None"]) else value)
    return values, unknown


def _kinds(values: Values) -> Values:
    """Return only the kinds in nested values."""
    nested = {name: _kinds(value) for name, value in values.items() if isinstance(value, dict)}
    return nested | ({"kind": values["kind"]} if "kind" in values else {})


def _describe_unknown(word: str, options: list[Option]) -> str:
    if not word.startswith("-"):
        return f"{word!r} is not an option. See --help."
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name, [name for option in options for name in option.names], n=1, cutoff=0.85)
    return f"{name} is unknown. {f'Did you mean {near[0]}?' if near else 'See --help.'}"


def _put(values: Values, path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        values = values.setdefault(name, {})
    values[path[-1]] = value


def _override(lower: Any, upper: Any) -> Any:
    """Merge nested values, preferring ``upper``. If the kinds differ, ``upper`` replaces ``lower`` completely."""
    if isinstance(lower, dict):
        upper = expand_kind(upper)
    if not isinstance(upper, dict):
        return upper
    lower = {} if lower is None else expand_kind(lower)
    if not isinstance(lower, dict):
        return lower  # pydantic will refuse it
    if upper.get("kind", lower.get("kind")) != lower.get("kind", upper.get("kind")):
        lower = {}
    return {**lower, **{name: _override(lower.get(name), value) for name, value in upper.items() if value != {}}}


def _with_defaults(model: type[BaseModel], given: Values) -> Values:
    """Return the given values and the defaults of all other fields, as plain nested values."""
    values = dict(given)
    for name, field in model.model_fields.items():
        default, nested = field.get_default(call_default_factory=True), nested_models(field)
        inner = expand_kind(given.get(name, {}))
        if nested and isinstance(inner, dict) and (inner or isinstance(default, BaseModel)):
            defaults = default.model_dump() if isinstance(default, BaseModel) else {}
            if not defaults or inner.get("kind", defaults.get("kind")) != defaults.get("kind"):
                # If one model has several kinds, it fills in defaults that depend on the kind itself, as in Python.
                fills_in = bool(defaults) and len(nested) == 1
                defaults = {} if fills_in else _with_defaults(_model_of_kind(nested, inner), inner)
            values[name] = _override(defaults, inner)
        elif name not in given and default is not PydanticUndefined:
            values[name] = default
    return values


def _model_of_kind(models: list[type[BaseModel]], values: Values) -> type[BaseModel]:
    """Return the model for the kind in ``values``, or the first model if the kind is missing or unknown."""
    return next((model for model in models if values.get("kind") in _kind_names(model)), models[0])


def _kind_names(*models: type[BaseModel]) -> tuple[str, ...]:
    fields = [model.model_fields["kind"] for model in models if "kind" in model.model_fields]
    return tuple(kind for field in fields for kind in typing.get_args(field.annotation))


def _options(models: list[type[BaseModel]], values: Values, path: tuple[str, ...] = ()) -> Iterator[Option]:
    """Yield the options of a model. If there are several models, choose the model for the kind in ``values``.

    The help shows ``values`` as the defaults.
    """
    model = _model_of_kind(models, values)
    fields = {**({} if path else {"config": CONFIG}), **model.model_fields}
    literal: Any = Literal
    positional = [name for name, field in fields.items() if _style(field).positional]
    for name in sorted(fields, key=lambda name: _rank(model, name)):
        field, kind, style = fields[name], fields[name].annotation, _style(fields[name])
        text, value = field.description or "", values.get(name, field.default)
        if nested := nested_models(field):
            inner = value if isinstance(value, dict) else _with_defaults(nested[0], {})
            yield from _options(nested, inner, (*path, name))
            continue
        option = f"--{_kebab('.'.join((*path, style.name or name)))}"
        names: tuple[str, ...] = () if name in positional else (option,)
        if name == "kind":
            names, kind = (option.removesuffix(".kind"), option), literal[_kind_names(*models)]
            text = "; ".join(other.model_fields["kind"].description or "" for other in models)
        nargs = _nargs(kind)
        if positional and nargs == "?":  # a word after a bool option could be the positional argument
            nargs = "0"
        extra: Any = field.json_schema_extra or {}
        yield Option(
            names,
            (*path, name),
            NoneType in typing.get_args(kind),
            nargs,
            style.metavar or _metavar(kind),
            _help_text(text, value),
            extra.get("group") or _kebab(".".join(path)),
        )


def _rank(model: type[BaseModel], name: str) -> int:
    """Return an option's rank in the help: required options first, then ``--config``, then common options."""
    common = getattr(model, "common", ())
    if name == "config":
        return 1
    if name == "kind" or model.model_fields[name].is_required():
        return 0
    return 2 + (common.index(name) if name in common else len(common))


def _style(field: FieldInfo) -> OptionStyle:
    return next((mark for mark in field.metadata if isinstance(mark, OptionStyle)), OptionStyle())


def _nargs(kind: Any) -> Any:
    origins = {typing.get_origin(part) for part in (kind, *typing.get_args(kind))}
    return "+" if dict in origins else "*" if tuple in origins else "?" if kind is bool else "1"


def _parser(options: list[Option], spec_type: type[Spec] = Spec, prog: str = "") -> argparse.ArgumentParser:
    positional = [option.metavar + " ..." * (option.nargs == "*") for option in options if not option.names]
    parser = argparse.ArgumentParser(
        usage=" ".join([prog, "[-h]", *positional, "[OPTIONS]"]),
        description=" ".join((spec_type.__doc__ or "").split()),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser._negative_number_matcher = re.compile(r"-[\d.]")  # before Python 3.14, argparse treats -1e-3 as an option
    parser.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
    sections: dict[str, Any] = {"": parser}
    for option in options:
        if option.section not in sections:
            sections[option.section] = parser.add_argument_group(option.section)
        add, dest = sections[option.section].add_argument, ".".join(option.path)
        takes: dict[str, Any] = {"metavar": option.metavar, "nargs": option.nargs, "const": True}
        if option.nargs == "0":
            takes = {"action": "store_true"}
        elif option.nargs != "?":
            takes = {"metavar": option.metavar, "nargs": None if option.nargs == "1" else option.nargs}
        if option.path == ("config",):
            takes["action"] = "append"
        elif option.names and option.nargs in ("*", "+"):
            takes["action"] = "extend"  # --grid A=1,2 --grid B=3,4 gives two axes
        text = option.help.replace("%", "%%")
        if not option.names:
            add(dest, help=text, **takes | {"nargs": takes["nargs"] or "?"})  # ``parse`` reports a missing value
        for name in option.names:
            add(name, dest=dest, help=text if name == option.names[0] else argparse.SUPPRESS, **takes)
    return parser


def _help_text(description: str, default: Any) -> str:
    """Return the help with the default. A description can end with "; default: X", which describes a missing value."""
    text, _, without_value = as_options(description).partition("; default: ")
    if default is PydanticUndefined:
        return f"{text} (required)"
    if default in (None, (), [], {}):
        if not without_value and "default" in text:
            return text
        shown = without_value or ("None" if default is None else "none")
    else:
        shown = " ".join(map(str, default)) if isinstance(default, tuple | list) else str(default)
    return f"{text} (default: {shown})"


def _metavar(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _metavar(parts[0])
    if origin is tuple:
        return _metavar(parts[0])
    if origin is dict:
        return "NAME=VALUE"
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if parts:
        return "|".join(_metavar(part) for part in parts if part is not NoneType)
    return "{True,False}" if kind is bool else str(getattr(kind, "metavar", kind.__name__.upper()))


def _kebab(name: str) -> str:
    return name.replace("_", "-")
