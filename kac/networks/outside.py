"""Networks of kind ``outside``: a PyTorch module, given by its import path, is the velocity field."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from kac.networks.velocity import CONDITIONING, Condition, Conditioning, LabelChoice, NetworkModule, NetworkOptions
from kac.util.errors import ArgumentError
from kac.util.imports import ARGUMENTS_HELP, FactoryArguments, ImportPath, build

OPTION = "`network.module`"


class OutsideConfig(NetworkOptions):
    """Options of a module from outside this project, which is called as module(x, t, label)."""

    kind: Literal["outside"] = Field(
        "outside", description="outside: your own module, given by its import path, called as module(x, t, label)"
    )
    conditions: tuple[Condition, ...] = Field((), max_length=0, description="must be empty for an outside network")
    module: ImportPath = Field(
        description="package.module:factory; factory: an nn.Module class, or a function annotated to return a module"
    )
    arguments: FactoryArguments = Field({}, description=ARGUMENTS_HELP)
    time: Literal["data_at_0", "data_at_1"] = Field(
        "data_at_0",
        description="time convention of the module; data_at_0: data are at t = 0, as in this project; data_at_1: data "
        "are at t = 1, so the module is called at 1 - t",
    )
    time_scale: PositiveFloat = Field(1.0, description="factor that multiplies t before the module is called")
    labels: LabelChoice = Field(
        "with_null",
        description="labels that the module accepts; with_null: classes, and a null label ('no class') after the last "
        "class; without_null: only classes, so guidance is impossible; none: no labels, called as module(x, t)",
    )

    @property
    def conditioning(self) -> Conditioning:
        """What the module can be conditioned on, according to ``labels``."""
        return CONDITIONING[self.labels]


class Outside(NetworkModule):
    """Wraps a module from outside this project as a velocity network. Training updates all parameters of the module."""

    def __init__(self, config: OutsideConfig, sample_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        if config.conditions:  # an objective can add conditions without validating the config
            conditions = ", ".join(config.conditions)
            raise ArgumentError(f"`network.conditions` is {conditions}, but {config.module} takes only time and label.")
        self.null_label, self.takes = num_classes if config.has_null_label else None, ()
        self.time, self.time_scale, self.labels = config.time, config.time_scale, config.labels
        self.name = config.module
        self.inner = build(OPTION, config.module, nn.Module, config.arguments)
        if next(self.inner.parameters(), None) is None:
            raise ArgumentError(f"{OPTION} {config.module} has no parameters. Give a module with weights.")

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return the velocity at x [batch, *sample_shape], t (scalar or [batch]) and label [batch], 0 .. null_label."""
        is_reversed = self.time == "data_at_1"
        times = (self.time_scale * (1 - t if is_reversed else t).float()).expand(len(x))  # [batch]
        inputs = (x, times) if self.labels == "none" else (x, times, label)
        velocity = _find_tensor(self.inner(*inputs))
        if not isinstance(velocity, Tensor) or velocity.shape != x.shape:
            result = f"shape {list(velocity.shape)}" if isinstance(velocity, Tensor) else type(velocity).__name__
            raise ArgumentError(f"{OPTION} {self.name} returns {result}, not a velocity of shape {list(x.shape)}.")
        return -velocity if is_reversed else velocity


def _find_tensor(output: Any) -> Any:
    """Return the tensor in an output: the output itself, the first item of a tuple, or ``sample`` (in diffusers)."""
    if isinstance(output, tuple):
        return output[0] if output else None
    return output if isinstance(output, Tensor) else getattr(output, "sample", output)
