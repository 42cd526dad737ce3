"""Networks of kind ``outside``: a velocity field written by others, given by its import path."""

import ast
import json
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator
from torch import Tensor, nn

from kac.networks.velocity import Conditioning, NetworkModule, NetworkOptions
from kac.util.errors import ArgumentError
from kac.util.imports import IMPORT_PATH, find_factory, make_module

OPTION = "`network.module`"


class OutsideConfig(NetworkOptions):
    """A module written by others, called as module(x, t, label)."""

    builds_on_meta: ClassVar[bool] = False  # a factory may compute with values, or read them from a file

    kind: Literal["outside"] = Field(
        "outside", description="outside: a module of your own, by its import path, called as module(x, t, label)"
    )
    module: str = Field(
        description="package.module:factory, where factory is an nn.Module class or a function annotated to return one"
    )
    arguments: dict[str, Any] = Field(
        {}, description="keyword arguments of the factory as NAME=VALUE: width=64 levels=[1,2] name=abc flag=true"
    )
    time: Literal["data_at_0", "data_at_1"] = Field(
        "data_at_0",
        description="time of the data in the module; data_at_0: t = 0, as in this project; data_at_1: t = 1, so the "
        "module is called at 1 - t",
    )
    time_scale: PositiveFloat = Field(1.0, description="factor that multiplies t before the module is called")
    labels: Literal["with_null", "without_null", "none"] = Field(
        "with_null",
        description="labels that the module accepts; with_null: classes, and 'no class' as the label after the last "
        "class; without_null: only classes, so there is no guidance; none: it is called as module(x, t)",
    )

    @property
    def conditioning(self) -> Conditioning:
        """What the module can be conditioned on, from ``labels``."""
        declared: dict[str, Conditioning] = {"with_null": "classes_and_null", "without_null": "classes"}
        return declared.get(self.labels, "none")

    @field_validator("module")
    @classmethod
    def _is_import_path(cls, module: str) -> str:
        if not IMPORT_PATH.fullmatch(module):
            raise ValueError("write it as package.module:factory.")
        return module

    @field_validator("arguments", mode="before")
    @classmethod
    def _parse_words(cls, given: Any) -> Any:
        return dict(_parse_argument(word) for word in given) if isinstance(given, list | tuple) else given

    @field_validator("arguments")
    @classmethod
    def _are_plain(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments as they will be read from config.json."""
        try:
            plain: dict[str, Any] = json.loads(json.dumps(arguments, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError(
                "values must be numbers, text, true, false, null, or lists and mappings of them."
            ) from None
        return plain

    @model_validator(mode="after")
    def _takes_no_conditions(self) -> Self:
        if self.conditions:
            raise ValueError(_conditions_message("conditions", self))
        return self


class Outside(NetworkModule):
    """A module written by others as a velocity network. Training updates all of its parameters."""

    def __init__(self, config: OutsideConfig, sample_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        if config.conditions:  # an objective may have added conditions without validating the config
            raise ArgumentError(_conditions_message("network.conditions", config))
        self.null_label, self.takes = num_classes if config.has_null_label else None, ()
        self.time, self.time_scale, self.labels = config.time, config.time_scale, config.labels
        self.name = config.module
        factory = find_factory(OPTION, config.module)
        # The config.json of a model folder names the factory, so it must not be able to call arbitrary functions.
        if not _returns_module(factory):
            raise ArgumentError(
                f"{OPTION} {config.module} is neither an nn.Module class nor a function annotated to return one. "
                "Annotate it: def factory(...) -> nn.Module."
            )
        self.inner = make_module(OPTION, config.module, factory, **config.arguments)
        if next(self.inner.parameters(), None) is None:
            raise ArgumentError(f"{OPTION} {config.module} has no parameters. Give a module with weights.")

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x [batch, *sample_shape], t scalar or [batch] in [0, 1], label [batch] in 0 .. null_label -> velocity like x.

        Raises:
            ArgumentError: the module does not return a tensor of the shape of x.
        """
        is_reversed = self.time == "data_at_1"
        times = (self.time_scale * (1 - t if is_reversed else t).float()).expand(len(x))  # [batch]
        inputs = (x, times) if self.labels == "none" else (x, times, label)
        velocity = _find_tensor(self.inner(*inputs))
        if not isinstance(velocity, Tensor) or velocity.shape != x.shape:
            result = f"shape {list(velocity.shape)}" if isinstance(velocity, Tensor) else type(velocity).__name__
            raise ArgumentError(f"{OPTION} {self.name} returns {result}, not a velocity of shape {list(x.shape)}.")
        return -velocity if is_reversed else velocity


def _find_tensor(output: Any) -> Any:
    """Return the output itself, the first item of a tuple, or the attribute ``sample`` (the name in diffusers)."""
    if isinstance(output, tuple):
        return output[0] if output else None
    return output if isinstance(output, Tensor) else getattr(output, "sample", output)


def _parse_argument(word: Any) -> tuple[str, Any]:
    """Parse NAME=VALUE. VALUE is JSON or a Python literal; any other word is text."""
    name, equals, text = str(word).partition("=")
    if not equals or not name.isidentifier():
        raise ValueError("write each argument as NAME=VALUE.")
    for parse in (json.loads, ast.literal_eval):
        try:
            return name, parse(text)
        except (ValueError, SyntaxError):
            continue
    if text[:1] in {"[", "{", "("}:
        raise ValueError("write lists and mappings as JSON.")
    return name, text


def _returns_module(factory: Callable[..., Any]) -> bool:
    try:
        result = factory if isinstance(factory, type) else typing.get_type_hints(factory).get("return")
    except (TypeError, NameError, AttributeError):
        return False
    return isinstance(result, type) and issubclass(result, nn.Module)


def _conditions_message(name: str, config: OutsideConfig) -> str:
    conditions = ", ".join(config.conditions)
    return f"`{name}` is {conditions}, but a network of kind outside takes only time and label."
