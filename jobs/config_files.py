"""What ``--config`` takes: a YAML file of options, or a recipe, which has a section of options for each stage.

    teach:
      network: {kind: unet, channels: [64, 128]}
    rollout:
      trajectories: 50000

The recipes of this folder's ``recipes/`` go by their names: ``--config fashion-mnist``.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from kac.errors import one_line
from kac.options import OptionError, nested_models
from pipeline.config import Spec

Values = dict[str, Any]

RECIPES = Path(__file__).with_name("recipes")
STAGES = ("teach", "convert", "rollout", "distill", "sweep", "evaluate", "sample")
"""The sections that a recipe may have."""


class _Spelled(float):
    """A number that ``str`` shows as it was written: a sweep names the folders of its trials after such values."""

    def __new__(cls, text: str) -> "_Spelled":
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    """YAML whose plain words mean what they mean on the command line.

    PyYAML reads YAML 1.1, where 2:8 is 128, 010 is 8, no is False, 1e-3 is text and 2024-01-01 is a date.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A decimal number."""
        return int(node.value)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A decimal number with a point or an exponent."""
        return _Spelled(node.value)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a name that is given twice: PyYAML would keep the last one without a word."""
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.MarkedYAMLError(problem=f"{twice} is given twice", problem_mark=node.start_mark)
        return node


_PLAIN_WORDS = {
    "null": (r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    "merge": (r"<<", ["<"]),
}
"""What a plain word can be beside text: a pattern, and the characters that it can begin with."""

_Loader.yaml_implicit_resolvers = {}
for _kind, (_pattern, _first) in _PLAIN_WORDS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_options(name: str, spec_type: type[Spec]) -> Values:
    """The options of a stage in a file or in the recipe ``name``, named as fields are: nested, with underscores.

    Args:
        name: the name of a recipe, or else the path of a file.
        spec_type: the options of the stage.

    Raises:
        OptionError: no such file or recipe, no YAML, no mapping, or a recipe without a section for the stage.
    """
    values = _read(RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name), name)
    if not isinstance(values, dict):
        raise OptionError(f"--config {name}: expected a mapping of options, found {type(values).__name__}")
    # A stage's name with a plain value is an option: --rollout of the sweep.
    if not any(key in STAGES and (value is None or isinstance(value, dict)) for key, value in values.items()):
        return _as_fields([spec_type], values)
    values = {key: {} if value is None else value for key, value in values.items()}  # a section may be empty
    if others := [str(key) for key, value in values.items() if key not in STAGES or not isinstance(value, dict)]:
        raise OptionError(
            f"--config {name}: expected sections of options for {', '.join(STAGES)} alone, since it has some, "
            f"found {', '.join(others)}"
        )
    if spec_type.stage not in values:
        raise OptionError(f"--config {name}: expected a section for {spec_type.stage}, found {', '.join(values)}")
    return _as_fields([spec_type], values[spec_type.stage])


def _read(path: Path, name: str) -> Any:
    if not name:
        raise OptionError("--config is empty. Give a YAML file, or the name of a recipe.")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except IsADirectoryError:
        raise OptionError(f"--config {name} is a folder. Give a YAML file, or the name of a recipe.") from None
    except (FileNotFoundError, NotADirectoryError):
        expected = f"expected a YAML file, or one of the recipes {', '.join(recipe_names())}"
        raise OptionError(f"--config {name}: {expected}, found neither") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"--config {name}: expected a YAML file, found: {one_line(error)}") from None


def _as_fields(models: list[type[BaseModel]], values: Values) -> Values:
    """Options under the names of their fields; the keys of an option that is a mapping itself stay as they are."""
    named: Values = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in named:
            raise OptionError(f"--config: {name.replace('_', '-')} and {name} are one option. Give it once.")
        nested = [inner for model in models for inner in nested_models(model.model_fields.get(name))]
        named[name] = _as_fields(nested, value) if nested and isinstance(value, dict) else value
    return named
