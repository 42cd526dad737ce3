"""Parse a command line and a file of options into a spec.

tyro only splits the command line and formats the help. It reads a mirror of the spec, in which every option is optional
and accepts any text. pydantic then validates the values of the command line and the file together. An invalid option
therefore gives the same error wherever it comes from, and tyro's own errors never appear.
"""

import difflib
import re
import typing
from collections.abc import Iterator
from itertools import pairwise
from types import NoneType
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import tyro
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from tyro.constructors import PrimitiveConstructorSpec

from jobs.config_files import Values, read_options, recipe_names
from kac.util.errors import ArgumentError, UnknownArgument, as_options
from kac.util.options import expand_kind, nested_models
from pipeline.config import Spec

SpecType = TypeVar("SpecType", bound=Spec)

_CONFIG_HELP = f"recipe ({', '.join(recipe_names())}) or YAML file of options; options of the command line override it"
POSITIONAL = typing.get_args(tyro.conf.Positional[str])[1]
_GROUP = typing.get_args(tyro.conf.OmitArgPrefixes[str])[1]
"""Marks a TypedDict whose options form a group in the help, and whose name is not part of the options."""


def parse(spec_type: type[SpecType], arguments: list[str], prog: str) -> SpecType:
    """Return the spec that the arguments describe. Options override the values of the ``--config`` file.

    An option with several kinds has the options of the chosen kind: ``--network unet --network.width 64``.

    Raises:
        ArgumentError: an option of the command line or the file is unknown, missing or invalid.
    """
    if sum(word.partition("=")[0] == "--config" for word in arguments) > 1:
        raise ArgumentError("`config` is given twice. Put all options into one file.")
    # The first pass only finds the file and the kinds, which determine the options of the second pass.
    first, _ = _read(_mirror([spec_type], _with_defaults(spec_type, {})), arguments, add_help=False)
    path = first.get("config")
    file = {} if path is None else read_options(path, spec_type)
    mirror = _mirror([spec_type], _with_defaults(spec_type, _override(file, _kinds(first))))
    given, unknown = _read(mirror, arguments, prog=prog, description=spec_type.__doc__)
    if unknown:
        raise ArgumentError(_describe_unknown(unknown[0], mirror))
    options = {name: value for name, value in given.items() if name != "config"}
    values = _with_defaults(spec_type, _override(file, options))
    for name, field in spec_type.model_fields.items():
        if POSITIONAL in field.metadata and not values.get(name):
            raise ArgumentError(f"{name.upper()} is required. See --help.")
        if typing.get_origin(field.annotation) is dict and given.get(name) == []:
            raise ArgumentError(f"`{name}` needs NAME=VALUE. See --help.")
    try:
        return spec_type(**values)
    except UnknownArgument as error:  # only the file can still have unknown options
        raise ArgumentError(f"`config` {path}: {error}") from None


def _read(mirror: Any, arguments: list[str], **tyro_options: Any) -> tuple[Values, list[str]]:
    """Return the given values, nested as in the models, and the words that belong to no option."""
    with_one_value = {option for option, nargs in _options(mirror) if nargs == 1}
    for option, following in pairwise([*arguments, "--"]):
        if _kebab(option) in with_one_value and re.match(r"-(?![\d.])", following):
            raise ArgumentError(f"{option} needs a value. See --help.")
    # Without this marker tyro searches source files for comments to use as help, which takes half of its time.
    config = (tyro.conf.HelptextFromCommentsOff,)
    given, unknown = tyro.cli(mirror, args=arguments, return_unknown_args=True, config=config, **tyro_options)
    values: Values = {}
    for name, value in given.items():
        values |= value if _is_group(mirror.__annotations__[name]) else {name: value}
    return values, unknown


def _kinds(values: Values) -> Values:
    """Return only the kinds in nested values."""
    nested = {name: _kinds(value) for name, value in values.items() if isinstance(value, dict)}
    return nested | ({"kind": values["kind"]} if "kind" in values else {})


def _override(lower: Any, upper: Any) -> Any:
    """Merge nested values; ``upper`` wins. Values of another kind replace the lower ones completely."""
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
                defaults = _with_defaults(_model_of_kind(nested, inner), inner)
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


def _describe_unknown(word: str, mirror: Any) -> str:
    if not word.startswith("-"):
        return f"{word!r} is not an option. See --help."
    option = word.partition("=")[0]
    near = difflib.get_close_matches(_kebab(option), [name for name, _ in _options(mirror)], n=1, cutoff=0.85)
    return f"{option} is unknown. {f'Did you mean {near[0]}?' if near else 'See --help.'}"


def _options(mirror: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Yield every option and the number of words that it takes, as argparse's ``nargs``."""
    for field, hint in mirror.__annotations__.items():
        option = prefix + _kebab(field)
        if _is_group(hint):
            yield from _options(typing.get_args(hint)[0], prefix)
        elif typing.is_typeddict(hint):
            yield from [(option, 1)] if "kind" in hint.__annotations__ else []
            yield from _options(hint, f"{option}.")
        else:
            _, constructor, *marks = typing.get_args(hint)
            names = [mark.name for mark in marks if getattr(mark, "name", None)]
            yield f"--{names[0]}" if names else option, constructor.nargs


def _is_group(hint: Any) -> bool:
    return _GROUP in typing.get_args(hint)


def _mirror(models: list[type[BaseModel]], values: Values, prefix: str = "--") -> Any:
    """Return a TypedDict of the options of a model: of several models, the one for the kind in ``values``.

    The help shows ``values`` as the defaults.
    """
    model = _model_of_kind(models, values)
    has_positional = any(POSITIONAL in field.metadata for field in model.model_fields.values())
    hints: Values = {}
    groups: dict[str, Values] = {}
    if prefix == "--":
        hints["config"] = _leaf(str, None, _CONFIG_HELP, tyro.conf.arg(metavar="RECIPE|FILE.yaml"), hint="")
    for name, field in model.model_fields.items():
        value = values.get(name, PydanticUndefined)
        extra: Any = field.json_schema_extra or {}
        group = groups.setdefault(extra["group"], {}) if "group" in extra else hints
        if nested := nested_models(field):
            inner = value if isinstance(value, dict) else _with_defaults(nested[0], {})
            hints[name] = _mirror(nested, inner, f"{prefix}{_kebab(name)}.")
        elif name == "kind":
            text = "; ".join(other.model_fields["kind"].description or "" for other in models)
            hints[name] = _leaf(Literal[_kind_names(*models)], value, text, tyro.conf.arg(aliases=[prefix[:-1]]))
        else:
            is_flag = has_positional and field.annotation is bool  # a word after it could be the positional argument
            group[name] = _leaf(field.annotation, value, field.description or "", *field.metadata, is_flag=is_flag)
    hints = {name: hints[name] for name in sorted(hints, key=lambda name: _help_rank(model, name))}
    for title, members in groups.items():
        annotated: Any = Annotated
        hints[title] = annotated[_typed_dict(title, members), _GROUP]
    return _typed_dict(model.__name__, hints, model.__doc__)


def _help_rank(model: type[BaseModel], name: str) -> int:
    """Return the position of an option in the help: required ones first, then ``--config``, then the common ones."""
    common = getattr(model, "common", ())
    if name == "config":
        return 1
    if name == "kind" or model.model_fields[name].is_required():
        return 0
    return 2 + (common.index(name) if name in common else len(common))


def _typed_dict(name: str, hints: Values, doc: str | None = None) -> Any:
    make: Any = TypedDict
    made = make(name, hints, total=False)
    made.__doc__ = doc
    return made


def _leaf(
    kind: Any, default: Any, description: str, *metadata: Any, is_flag: bool = False, hint: str | None = None
) -> Any:
    """Return the mirror of one option, whose value is the word or words after it. A bool without a word is True."""
    parts = typing.get_args(kind)
    takes_many = any(typing.get_origin(part) in {tuple, dict} for part in (kind, *parts))

    def from_words(words: list[str]) -> Any:
        if kind is bool and not words:
            return True
        if is_flag or (words == ["None"] and NoneType in parts):
            return is_flag or None
        return words[0] if len(words) == 1 and not takes_many else words

    constructor: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
        nargs=0 if is_flag else (0, 1) if kind is bool else "*" if takes_many or POSITIONAL in metadata else 1,
        metavar="" if is_flag else _metavar(kind),
        instance_from_str=from_words,
        is_instance=lambda _: True,
        str_from_instance=lambda _: [],
    )
    text, default_hint = _help_texts(as_options(description), default)
    about = tyro.conf.arg(help=text or None, help_behavior_hint=default_hint if hint is None else hint)
    annotated: Any = Annotated
    return annotated[Any, constructor, about, *metadata]


def _help_texts(description: str, default: Any) -> tuple[str, str]:
    """Return the help and its hint. A description can end with what happens without a value, "; default: X"."""
    text, _, without_value = description.partition("; default: ")
    if default is PydanticUndefined:
        return text, "(required)"
    if default in (None, (), [], {}):
        if not without_value and "default" in text:
            return text, ""
        return text, f"(default: {without_value or (None if default is None else 'none')})"
    return text, f"(default: {' '.join(map(str, default)) if isinstance(default, tuple | list) else default})"


def _metavar(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _metavar(parts[0])
    if origin is tuple:
        return f"[{_metavar(parts[0])} ...]"
    if origin is dict:
        return "[NAME=VALUE ...]"
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if parts:
        return "|".join(_metavar(part) for part in parts if part is not NoneType)
    return "{True,False}" if kind is bool else getattr(kind, "metavar", kind.__name__.upper())


def _kebab(name: str) -> str:
    return name.replace("_", "-")
