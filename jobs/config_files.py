"""What ``--config`` takes: a YAML file of options, or a recipe, which has a section of options for each stage.

    teach:
      network: {kind: unet, channels: [64, 128]}
    rollout:
      trajectories: 50000

The recipes of this folder's ``recipes/`` go by their names: ``--config fashion-mnist``.
"""

from pathlib import Path
from typing import Any

import yaml

from kac.errors import one_line
from kac.options import OptionError

Values = dict[str, Any]

RECIPES = Path(__file__).with_name("recipes")
STAGES = ("teach", "convert", "rollout", "distill", "sweep", "evaluate", "sample")
"""The sections that a recipe may have."""


class _Loader(yaml.SafeLoader):
    """YAML in which ``2:8`` is a word: version 1.1 takes it for 128, a number to the base 60."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        """A number, or the word with a colon."""
        return node.value if ":" in node.value else super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_options(name: str, stage: str) -> Values:
    """The options of ``stage`` in a file or in the recipe ``name``, named as fields are: nested, with underscores.

    Args:
        name: the name of a recipe, or else the path of a file.

    Raises:
        OptionError: no such file or recipe, no YAML, no mapping, or a recipe without a section for the stage.
    """
    values = _read(RECIPES / f"{name}.yaml" if name in recipe_names() else Path(name), name)
    if not isinstance(values, dict):
        raise OptionError(f"--config {name}: expected a mapping of options, found {type(values).__name__}")
    # A stage's name with a plain value is an option: --rollout of the sweep.
    if not any(key in STAGES and (value is None or isinstance(value, dict)) for key, value in values.items()):
        return _as_fields(values)
    values = {key: {} if value is None else value for key, value in values.items()}  # a section may be empty
    if others := [str(key) for key, value in values.items() if key not in STAGES or not isinstance(value, dict)]:
        raise OptionError(
            f"--config {name}: expected sections of options for {', '.join(STAGES)} alone, since it has some, "
            f"found {', '.join(others)}"
        )
    if stage not in values:
        raise OptionError(f"--config {name}: expected a section for {stage}, found {', '.join(values)}")
    return _as_fields(values[stage])


def _read(path: Path, name: str) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        expected = f"expected a YAML file, or one of the recipes {', '.join(recipe_names())}"
        raise OptionError(f"--config {name}: {expected}, found neither") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"--config {name}: expected a YAML file, found: {one_line(error)}") from None


def _as_fields(values: Values) -> Values:
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    return {name: _as_fields(value) if isinstance(value, dict) else value for name, value in named.items()}
