"""Read the argument of ``--config``: a YAML file of options, or the name of a recipe in ``recipes/``.

A file has the options of one stage, or a section of options for each stage:

    teach:
      network: {kind: unet, channels: [64, 128]}
    rollout:
      trajectories: 50000
"""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from kac.util.errors import ArgumentError, one_line
from kac.util.options import nested_models
from pipeline.config import Spec

Values = dict[str, Any]

RECIPES = Path(__file__).with_name("recipes")
STAGES = ("teach", "convert", "rollout", "distill", "sweep", "evaluate", "sample")
"""The sections that a file can have."""


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_options(name: str, spec_type: type[Spec]) -> Values:
    """Return a stage's options from a file, nested, under the names of the fields.

    Args:
        name: the name of a recipe, or the path of a file.
        spec_type: the options of the stage.

    Raises:
        ArgumentError: the file does not exist or is not YAML, has no mapping, or has sections but none for the stage.
    """
    values = _read_yaml(RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name), name)
    if not isinstance(values, dict):
        raise ArgumentError(f"`config` {name} holds a {type(values).__name__}. Write it as lines of OPTION: VALUE.")
    # A stage's name with a plain value is an option, such as the sweep's --rollout.
    if not any(key in STAGES and (value is None or isinstance(value, dict)) for key, value in values.items()):
        return _as_fields([spec_type], values)
    values = {key: {} if value is None else value for key, value in values.items()}  # an empty section is None
    if others := [str(key) for key, value in values.items() if key not in STAGES or not isinstance(value, dict)]:
        raise ArgumentError(
            f"`config` {name} has sections, but {', '.join(others)} is outside of them. "
            f"Move it into one of {', '.join(STAGES)}."
        )
    if spec_type.stage not in values:
        raise ArgumentError(f"`config` {name} has no section for {spec_type.stage}, only for {', '.join(values)}.")
    return _as_fields([spec_type], values[spec_type.stage])


def _read_yaml(path: Path, name: str) -> Any:
    if not name:
        raise ArgumentError("`config` is empty. Give a YAML file, or the name of a recipe.")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except IsADirectoryError:
        raise ArgumentError(f"`config` {name} is a folder. Give a YAML file, or the name of a recipe.") from None
    except (FileNotFoundError, NotADirectoryError):
        recipes = ", ".join(recipe_names())
        raise ArgumentError(f"`config` {name} is neither a file nor a recipe. The recipes are {recipes}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"`config` {name} is not a readable YAML file: {one_line(error)}.") from None


def _as_fields(models: list[type[BaseModel]], values: Values) -> Values:
    """Replace - by _ in option names. The keys of an option that is itself a mapping stay unchanged."""
    named: Values = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in named:
            raise ArgumentError(f"`config`: {name.replace('_', '-')} and {name} are the same option. Give it once.")
        nested = [inner for model in models for inner in nested_models(model.model_fields.get(name))]
        named[name] = _as_fields(nested, value) if nested and isinstance(value, dict) else value
    return named


class _FloatAsWritten(float):
    """A float whose ``str`` is its text in the file, because a sweep names trial folders after such values."""

    def __new__(cls, text: str) -> "_FloatAsWritten":
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads plain scalars as the command line does.

    PyYAML reads YAML 1.1, in which 2:8 is 128, 010 is 8, no is False, 1e-3 is text and 2024-01-01 is a date.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a decimal integer."""
        return int(node.value)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """Return a decimal number with a point or an exponent."""
        return _FloatAsWritten(node.value)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse duplicate keys, of which PyYAML silently keeps the last."""
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if duplicate := next((name for name in names if names.count(name) > 1), None):
            raise yaml.MarkedYAMLError(problem=f"{duplicate} is given twice", problem_mark=node.start_mark)
        return node


_PLAIN_SCALARS = {
    "null": (r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    "merge": (r"<<", ["<"]),
}
"""For each type of plain scalar except text: a pattern, and the possible first characters."""

_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _PLAIN_SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
