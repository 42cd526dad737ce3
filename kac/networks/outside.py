"""A velocity field that others wrote, by its import path: their module, called their way."""

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
    """A module that others wrote, called as module(x, t, label)."""

    builds_on_meta: ClassVar[bool] = False  # a factory may look at numbers, or read them from a file

    kind: Literal["outside"] = Field(
        "outside", description="outside: a module that others wrote, by its import path, called as module(x, t, label)"
    )
    module: str = Field(
        description="package.module:factory, a class of nn.Module or a function that is annotated to return one"
    )
    arguments: dict[str, Any] = Field(
        {}, description="keyword arguments of the factory, as NAME=VALUE: width=64 levels=[1,2] name=abc flag=true"
    )
    time: Literal["data_at_0", "data_at_1"] = Field(
        "data_at_0",
        description="data_at_0: t = 0 is data, as here; data_at_1: t = 1 is, so the module is called at 1 - t",
    )
    time_scale: PositiveFloat = Field(1.0, description="times are given to the module times this")
    labels: Literal["with_null", "without_null", "none"] = Field(
        "with_null",
        description="with_null: the label after the last class is 'no class'; without_null: the module knows classes "
        "alone, so there is no guidance; none: it is called as module(x, t)",
    )

    @property
    def conditioning(self) -> Conditioning:
        """What the module can be conditioned on, as ``labels`` declares."""
        declared: dict[str, Conditioning] = {"with_null": "classes_and_null", "without_null": "classes"}
        return declared.get(self.labels, "none")

    @field_validator("module")
    @classmethod
    def _is_import_path(cls, module: str) -> str:
        if not IMPORT_PATH.fullmatch(module):
            raise ValueError("expected package.module:factory")
        return module

    @field_validator("arguments", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return dict(_argument(word) for word in given) if isinstance(given, list | tuple) else given

    @field_validator("arguments")
    @classmethod
    def _are_plain(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """As they will be read from config.json."""
        try:
            plain: dict[str, Any] = json.loads(json.dumps(arguments, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError("expected numbers, text, truth values, lists and mappings of them") from None
        return plain

    @model_validator(mode="after")
    def _takes_no_conditions(self) -> Self:
        if self.conditions:
            raise ValueError(_no_conditions("conditions", self))
        return self


class Outside(NetworkModule):
    """The module behind the interface of a velocity network; all of it is trained, where it is trained."""

    def __init__(self, config: OutsideConfig, sample_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        if config.conditions:  # those of an objective are not checked by the config
            raise ArgumentError(_no_conditions("network.conditions", config))
        self.null_label, self.takes = num_classes if config.has_null_label else None, ()
        self.time, self.time_scale, self.labels = config.time, config.time_scale, config.labels
        self.name = config.module
        factory = find_factory(OPTION, config.module)
        # A model folder names the factory, and must not be able to call whatever is installed.
        if not _declares_module(factory):
            raise ArgumentError(
                f"{OPTION} {config.module}: expected a class of nn.Module, or a function annotated to return one "
                f"(def factory(...) -> nn.Module), found {type(factory).__name__}"
            )
        self.inner = make_module(OPTION, config.module, factory, **config.arguments)
        if next(self.inner.parameters(), None) is None:
            raise ArgumentError(f"{OPTION} {config.module}: expected a module with parameters, found none")

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x [batch, *sample_shape], t scalar or [batch] in [0, 1], label [batch] in 0 .. null_label -> like x.

        Raises:
            ArgumentError: the module gives something else.
        """
        is_reversed = self.time == "data_at_1"
        times = (self.time_scale * (1 - t if is_reversed else t).float()).expand(len(x))  # [batch]
        given = (x, times) if self.labels == "none" else (x, times, label)
        velocity = _tensor(self.inner(*given))
        if not isinstance(velocity, Tensor) or velocity.shape != x.shape:
            found = list(velocity.shape) if isinstance(velocity, Tensor) else type(velocity).__name__
            raise ArgumentError(f"{OPTION} {self.name}: expected a velocity of shape {list(x.shape)}, found {found}")
        return -velocity if is_reversed else velocity


def _tensor(output: Any) -> Any:
    """The velocity in what a module gives: itself, the first of a tuple, or ``sample``, as diffusers calls it."""
    if isinstance(output, tuple):
        return output[0] if output else None
    return output if isinstance(output, Tensor) else getattr(output, "sample", output)


def _argument(word: Any) -> tuple[str, Any]:
    """NAME=VALUE, with the value in JSON or Python's way of writing it; a bare word is text."""
    name, equals, text = str(word).partition("=")
    if not equals or not name.isidentifier():
        raise ValueError("expected NAME=VALUE")
    for read in (json.loads, ast.literal_eval):
        try:
            return name, read(text)
        except (ValueError, SyntaxError):
            continue
    if text[:1] in {"[", "{", "("}:
        raise ValueError("expected lists and mappings as JSON has them")
    return name, text


def _declares_module(factory: Callable[..., Any]) -> bool:
    try:
        made = factory if isinstance(factory, type) else typing.get_type_hints(factory).get("return")
    except (TypeError, NameError, AttributeError):
        return False
    return isinstance(made, type) and issubclass(made, nn.Module)


def _no_conditions(name: str, config: OutsideConfig) -> str:
    found = ", ".join(config.conditions)
    return f"`{name}`: expected none, since a module from outside takes time and label alone, found {found}"
