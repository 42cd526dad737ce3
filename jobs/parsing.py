"""A spec from the words of a command line and a file of options.

tyro splits the words and draws the help but judges nothing: what it reads are mirrors of the option models, where every
option may be left out and any word will do. The words and the file's values then go to pydantic together. So a wrong
option gets the same sentence wherever it comes from, and no error of tyro's has to be understood here.
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
from kac.util.options import kind_alone, nested_models
from pipeline.config.specs import Spec

SpecType = TypeVar("SpecType", bound=Spec)

_CONFIG_HELP = f"a recipe ({', '.join(recipe_names())}) or a file of options, which those of the command line override"
POSITIONAL = typing.get_args(tyro.conf.Positional[str])[1]


def parse(spec_type: type[SpecType], arguments: list[str], prog: str) -> SpecType:
    """The spec that the arguments describe; ``--config`` gives values that options override.

    Where there are several kinds, the options are those of the chosen kind: ``--network unet --network.width 64``.

    Raises:
        ArgumentError: unknown, missing or invalid options, on the command line or in the file.
    """
    if sum(word.partition("=")[0] == "--config" for word in arguments) > 1:
        raise ArgumentError("`config`: expected one recipe or YAML file, found several: put all options into one")
    first, _ = _read(_mirror([spec_type], _filled(spec_type, {})), arguments, add_help=False)
    path = first.get("config")
    file = {} if path is None else read_options(path, spec_type)
    mirror = _mirror([spec_type], _filled(spec_type, _over(file, _kinds(first))))
    given, unknown = _read(mirror, arguments, prog=prog, description=spec_type.__doc__)
    if unknown:
        raise ArgumentError(_unknown(unknown[0], mirror))
    values = _filled(spec_type, _over(file, {name: value for name, value in given.items() if name != "config"}))
    for name, field in spec_type.model_fields.items():
        if POSITIONAL in field.metadata and not values.get(name):
            raise ArgumentError(f"expected {name.upper()}, found none: see --help")
        if typing.get_origin(field.annotation) is dict and given.get(name) == []:
            raise ArgumentError(f"`{name}`: expected NAME=VALUE, found none: leave it out, or see --help")
    try:
        return spec_type(**values)
    except UnknownArgument as error:  # those of the command line are known by now
        raise ArgumentError(f"`config` {path}: {error}") from None


def _kinds(values: Values) -> Values:
    nested = {name: _kinds(value) for name, value in values.items() if isinstance(value, dict)}
    return nested | ({"kind": values["kind"]} if "kind" in values else {})


def _over(former: Any, latter: Any) -> Any:
    """``latter``, and ``former`` for what it leaves out; an object of another kind replaces the former whole."""
    if isinstance(former, dict):
        latter = kind_alone(latter)
    if not isinstance(latter, dict):
        return latter
    former = {} if former is None else kind_alone(former)
    if not isinstance(former, dict):
        return former  # for pydantic to refuse
    if latter.get("kind", former.get("kind")) != former.get("kind", latter.get("kind")):
        former = {}
    return {**former, **{name: _over(former.get(name), value) for name, value in latter.items() if value != {}}}


def _filled(model: type[BaseModel], asked: Values) -> Values:
    """What is asked for, and the defaults of the rest, as plain values."""
    values = dict(asked)
    for name, field in model.model_fields.items():
        default, nested = field.get_default(call_default_factory=True), nested_models(field)
        inner = kind_alone(asked.get(name, {}))
        if nested and isinstance(inner, dict) and (inner or isinstance(default, BaseModel)):
            own = default.model_dump() if isinstance(default, BaseModel) else {}
            if not own or inner.get("kind", own.get("kind")) != own.get("kind"):
                own = _filled(_of_kind(nested, inner), inner)
            values[name] = _over(own, inner)
        elif name not in asked and default is not PydanticUndefined:
            values[name] = default
    return values


def _of_kind(models: list[type[BaseModel]], values: Values) -> type[BaseModel]:
    """The model of the kind of the values; the first one if they have none, or an unknown one."""
    return next((model for model in models if values.get("kind") in _kinds_of(model)), models[0])


def _kinds_of(*models: type[BaseModel]) -> tuple[str, ...]:
    fields = [model.model_fields["kind"] for model in models if "kind" in model.model_fields]
    return tuple(kind for field in fields for kind in typing.get_args(field.annotation))


def _read(mirror: Any, arguments: list[str], **how: Any) -> tuple[Values, list[str]]:
    """The values that are given, nested as in the models, and the words that belong to no option."""
    takes_one = {option for option, count in _options(mirror) if count == 1}
    for option, following in pairwise([*arguments, "--"]):
        if _kebab(option) in takes_one and re.match(r"-(?![\d.])", following):
            raise ArgumentError(f"{option}: expected a value, found none: see --help")
    # Without this marker tyro looks for help texts in comments of source files, which takes half of its time.
    config = (tyro.conf.HelptextFromCommentsOff,)
    given, unknown = tyro.cli(mirror, args=arguments, return_unknown_args=True, config=config, **how)
    return given, unknown


def _unknown(word: str, mirror: Any) -> str:
    if not word.startswith("-"):
        return f"expected an option, found {word!r}: see --help"
    option = word.partition("=")[0]
    near = difflib.get_close_matches(_kebab(option), [name for name, _ in _options(mirror)], n=1, cutoff=0.85)
    return f"{option}: unknown option{f', perhaps {near[0]}' if near else ''}: see --help"


def _options(mirror: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Every option, with the number of words that it takes."""
    for field, hint in mirror.__annotations__.items():
        option = prefix + _kebab(field)
        if typing.is_typeddict(hint):
            yield from [(option, 1)] if "kind" in hint.__annotations__ else []
            yield from _options(hint, f"{option}.")
        else:
            _, words, *marks = typing.get_args(hint)
            names = [mark.name for mark in marks if getattr(mark, "name", None)]
            yield f"--{names[0]}" if names else option, words.nargs


def _mirror(models: list[type[BaseModel]], values: Values, prefix: str = "--") -> Any:
    """A TypedDict of the options of a model, the one of several that has the kind of ``values``.

    The help shows ``values`` as their defaults.
    """
    model = _of_kind(models, values)
    has_positional = any(POSITIONAL in field.metadata for field in model.model_fields.values())
    hints: Values = {}
    for name, field in model.model_fields.items():
        value = values.get(name, PydanticUndefined)
        if nested := nested_models(field):
            inner = value if isinstance(value, dict) else _filled(nested[0], {})
            hints[name] = _mirror(nested, inner, f"{prefix}{_kebab(name)}.")
        elif name == "kind":
            text = as_options("; ".join(other.model_fields["kind"].description or "" for other in models))
            hints[name] = _leaf(Literal[_kinds_of(*models)], value, tyro.conf.arg(help=text, aliases=[prefix[:-1]]))
        else:
            is_flag = has_positional and field.annotation is bool  # a word after it would be taken for the positional
            about = tyro.conf.arg(help=as_options(field.description or "") or None)
            hints[name] = _leaf(field.annotation, value, about, *field.metadata, is_flag=is_flag)
    if prefix == "--":
        about = tyro.conf.arg(help=_CONFIG_HELP, metavar="RECIPE|FILE.yaml")
        hints["config"] = _leaf(str, None, about)
    make: Any = TypedDict
    mirror = make(model.__name__, hints, total=False)
    mirror.__doc__ = model.__doc__
    return mirror


def _leaf(kind: Any, default: Any, *metadata: Any, is_flag: bool = False) -> Any:
    """An option whose value is the word or words that follow it; a truth value alone, without a word, is True."""
    parts = typing.get_args(kind)
    takes_many = any(typing.get_origin(part) in {tuple, dict} for part in (kind, *parts))

    def value(words: list[str]) -> Any:
        if kind is bool and not words:
            return True
        if is_flag or (words == ["None"] and NoneType in parts):
            return is_flag or None
        return words[0] if len(words) == 1 and not takes_many else words

    words: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
        nargs=0 if is_flag else (0, 1) if kind is bool else "*" if takes_many or POSITIONAL in metadata else 1,
        metavar="" if is_flag else _metavar(kind),
        instance_from_str=value,
        is_instance=lambda _: True,
        str_from_instance=lambda _: [],
    )
    text = " ".join(map(str, default)) or "none" if isinstance(default, tuple | list) else default
    hint = "(required)" if default is PydanticUndefined else f"(default: {text})"
    annotated: Any = Annotated
    return annotated[Any, words, tyro.conf.arg(help_behavior_hint=hint), *metadata]


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
        return "|".join(map(_metavar, parts))
    return {bool: "{True,False}", NoneType: "None"}.get(kind) or getattr(kind, "metavar", kind.__name__.upper())


def _kebab(name: str) -> str:
    return name.replace("_", "-")
