"""Read the argument of ``--config``: a YAML file of options, or the name of a recipe in ``recipes/``.

A file contains the options of one stage, or one section of options per stage:

    teach:
      network: {kind: unet, channels: [64, 128]}
    rollout:
      trajectories: 50000
"""

import contextlib
import os
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
# The sections of a file.
STAGES = (
    *("teach", "convert", "rollout", "distill", "sweep", "evaluate", "study", "sample", "export", "quickstart"),
    "benchmark",
)


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_options(name: str, spec_type: type[Spec]) -> Values:
    """Return a stage's options from a recipe or a file, as nested values with the names of the spec's fields.

    Raises ``ArgumentError`` if the file is not YAML, is not a mapping, or has sections but none for the stage.
    """
    values = _read_yaml(name)
    if not isinstance(values, dict):
        raise ArgumentError(f"`config` {name} contains a {type(values).__name__}. Write lines of OPTION: VALUE.")
    # A stage's name with a plain value is an option, such as the sweep's --rollout. An empty section is None in YAML.
    sections = {key: value or {} for key, value in values.items() if value is None or isinstance(value, dict)}
    if not any(key in STAGES for key in sections):
        return _as_fields([spec_type], values)
    if others := [str(key) for key in values if key not in STAGES or key not in sections]:
        raise ArgumentError(
            f"`config` {name} has sections, but {', '.join(others)} is outside them. "
            f"Move it into one of the sections {', '.join(STAGES)}."
        )
    if (section := spec_type.section or spec_type.stage) not in sections:
        raise ArgumentError(f"`config` {name} has no section for {section}, only for {', '.join(sections)}.")
    return _as_fields([spec_type], sections[section])


def _read_yaml(name: str) -> Any:
    path = RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name)
    if not name or os.path.isdir(path):  # unlike Path.is_dir, it never raises
        found = f"{name} is a folder" if name else "is empty"
        raise ArgumentError(f"`config` {found}. Give a YAML file, or the name of a recipe.")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (FileNotFoundError, NotADirectoryError):
        recipes = ", ".join(recipe_names())
        raise ArgumentError(f"`config` {name} is neither a file nor a recipe. The recipes are {recipes}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"`config` {name} is not a readable YAML file: {one_line(error)}.") from None


def _as_fields(models: list[type[BaseModel]], values: Values) -> Values:
    """Replace - with _ in option names. If an option's value is a mapping, the mapping's keys stay unchanged."""
    named: Values = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in named:
            raise ArgumentError(f"`config`: {name.replace('_', '-')} and {name} are the same option. Give it once.")
        nested = [inner for model in models for inner in nested_models(model.model_fields.get(name))]
        named[name] = _as_fields(nested, value) if nested and isinstance(value, dict) else value
    return named


class _FloatAsWritten(float):
    """A float whose ``str`` is its text in the file. A sweep uses this text in the names of trial folders."""

    text: str

    def __new__(cls, text: str) -> "_FloatAsWritten":
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads plain scalars as the command line does, and refuses duplicate keys.

    PyYAML reads YAML 1.1, in which 2:8 is 128, 010 is 8, no is False, 1e-3 is text and 2024-01-01 is a date. It
    silently keeps the last of duplicate keys.
    """

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<$"))]}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping. Raise ``MarkedYAMLError`` if a key occurs twice."""
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if duplicate := next((name for name in names if names.count(name) > 1), None):
            raise yaml.MarkedYAMLError(problem=f"{duplicate} is given twice", problem_mark=node.start_mark)
        return node

    def construct_text(self, node: yaml.ScalarNode) -> Any:
        """Return a quoted scalar as text, and a plain scalar as None, a bool, a decimal number or text."""
        text = self.construct_scalar(node)
        if node.style:
            return text
        if re.fullmatch(r"[-+.0-9][-+.0-9_eE]*", text):
            for number in (int, _FloatAsWritten):
                with contextlib.suppress(ValueError):
                    return number(text)
        return _WORDS.get(text, text)


_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL", "None")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
