"""Networks of kind ``outside``: a velocity field written by others, given by its import path."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from kac.networks.velocity import Conditioning, NetworkModule, NetworkOptions
from kac.util.errors import ArgumentError
from kac.util.imports import ARGUMENTS_HELP, FactoryArguments, ImportPath, build

OPTION = "`network.module`"


class OutsideConfig(NetworkOptions):
    """A module written by others, called as module(x, t, label)."""

    builds_on_meta: ClassVar[bool] = False  # a factory may compute with values, or read them from a file

    kind: Literal["outside"] = Field(
        "outside", description="outside: a module of your own, by its import path, called as module(x, t, label)"
    )
    module: ImportPath = Field(
        description="package.module:factory, where factory is an nn.Module class or a function annotated to return one"
    )
    arguments: FactoryArguments = Field({}, description=ARGUMENTS_HELP)
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
        if self.labels == "none":
            return "none"
        return "classes_and_null" if self.labels == "with_null" else "classes"

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
        self.inner = build(OPTION, config.module, nn.Module, config.arguments)
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


def _conditions_message(name: str, config: OutsideConfig) -> str:
    conditions = ", ".join(config.conditions)
    return f"`{name}` is {conditions}, but a network of kind outside takes only time and label."
