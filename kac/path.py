"""Paths between data (t = 0) and noise (t = 1): the point at time t and the target velocity."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from kac.clocks import CLOCKS, SIGNALS, ClockName, SignalName
from kac.process import KacProcess
from kac.util.errors import check_known
from kac.util.options import Kinded, expand_kind


class PathSample(NamedTuple):
    """Points on a path with their flow-matching targets."""

    x_t: Tensor  # [batch, *sample]
    target: Tensor  # [batch, *sample], the velocity u_t
    t: Tensor  # [batch]


@dataclass(frozen=True)
class KacPath:
    """x_t = f(t) x_0 + K_{g(t)} with an independent Kac process per coordinate (arXiv 2509.21513).

    Example:
        >>> path = KacPath(KacProcess(a=9, c=3))
        >>> point = path.sample(torch.zeros(4, 1, 8, 8), t=torch.rand(4))
        >>> point.x_t.shape, point.target.shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4, 1, 8, 8]))
        >>> path.speed_limit()  # for data in [-1, 1]
        7.0

    Raises:
        ValueError: the signal or clock is unknown.
    """

    process: KacProcess = field(default_factory=KacProcess)
    signal: SignalName = "linear"
    clock: ClockName = "quadratic"
    uniforms_per_coordinate: ClassVar[int] = 3

    def __post_init__(self) -> None:
        check_known("signal", self.signal, SIGNALS)
        check_known("clock", self.clock, CLOCKS)

    def sample(self, x_0: Tensor, t: Tensor, generator: torch.Generator | None = None) -> PathSample:
        """Add noise to ``x_0`` [batch, *sample] for the times ``t`` [batch] in [0, 1].

        The target is u_t = f'(t) x_0 + g'(t) v(K, g(t)).
        """
        t_each, f, g = _per_sample(t, x_0), SIGNALS[self.signal], CLOCKS[self.clock]
        elapsed = g.value(t_each).expand(x_0.shape)
        k = self.process.sample(elapsed, generator)
        v = self.process.velocity(k.displacement, elapsed, k.is_atom)
        target = f.derivative(t_each) * x_0 + g.derivative(t_each) * v
        return PathSample(f.value(t_each) * x_0 + k.displacement, target, t.expand(len(x_0)))

    def point(self, x_0: Tensor | float, t: float, uniforms: Tensor) -> Tensor:
        """Return x_t at a common time ``t``, computed from uniforms [3, *shape] in (0, 1), float64."""
        time = torch.tensor(t, dtype=torch.float64)
        elapsed = CLOCKS[self.clock].value(time).item()
        return SIGNALS[self.signal].value(time) * x_0 + self.process.from_uniforms(uniforms, elapsed)

    def speed_limit(self, data_bound: float = 1.0) -> float:
        """Return sup|f'| data_bound + c sup g', which bounds each velocity component for data within +-data_bound."""
        return SIGNALS[self.signal].slope_bound * data_bound + self.process.c * CLOCKS[self.clock].slope_bound

    def speed_limit_at(self, t: Tensor) -> Tensor:
        """Return |f'(t)| + c g'(t), which bounds each velocity component at the times ``t`` for data in [-1, 1]."""
        return SIGNALS[self.signal].derivative(t).abs() + self.process.c * CLOCKS[self.clock].derivative(t)


@dataclass(frozen=True)
class GaussianPath:
    """Ordinary flow matching with the interface of ``KacPath``: x_t = (1 - t) x_0 + t eps, u_t = eps - x_0.

    Example:
        >>> GaussianPath().sample(torch.zeros(4, 2), t=torch.rand(4)).target.shape
        torch.Size([4, 2])
    """

    uniforms_per_coordinate: ClassVar[int] = 1

    def sample(self, x_0: Tensor, t: Tensor, generator: torch.Generator | None = None) -> PathSample:
        """Add noise to ``x_0`` [batch, *sample] for the times ``t`` [batch] in [0, 1]."""
        eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)
        t_each = _per_sample(t, x_0)
        return PathSample((1 - t_each) * x_0 + t_each * eps, eps - x_0, t.expand(len(x_0)))

    def point(self, x_0: Tensor | float, t: float, uniforms: Tensor) -> Tensor:
        """Return x_t at a common time ``t``, computed from uniforms [1, *shape] in (0, 1), float64."""
        return (1 - t) * x_0 + t * torch.special.ndtri(uniforms[0])  # type: ignore[no-any-return]

    def speed_limit(self, data_bound: float = 1.0) -> float:
        """Return infinity, because Gaussian noise is unbounded."""
        return float("inf")


Path = KacPath | GaussianPath
"""Any path. A new path class needs ``sample``, ``point``, ``speed_limit`` and ``uniforms_per_coordinate``."""


FORMER_DEFAULTS: dict[str, Any] = {"a": 9.0, "c": 3.0, "clock": "linear"}
"""The defaults of older versions, as in arXiv 2509.21513. Their teachers are worse (kac/RESULTS.md)."""


def _option(default: Any, name: str, description: str) -> Any:
    return Field(default, description=description, json_schema_extra={"neutral": FORMER_DEFAULTS[name]})


class PathConfig(Kinded):
    """The options of a path: plain values that specs and model folders contain."""

    kind: Literal["kac", "gaussian"] = Field("kac", description="kac, or gaussian (ordinary flow matching)")
    a: PositiveFloat = _option(25.0, "a", "reversal rate of the Kac process, 1/time")
    c: PositiveFloat = _option(5.0, "c", "speed of the Kac process, length/time")
    signal: SignalName = Field("linear", description="f(t), the weight of the data: linear is 1 - t")
    clock: ClockName = _option("quadratic", "clock", "g(t), the time of the Kac process: linear is t, quadratic is t^2")

    @model_validator(mode="before")
    @classmethod
    def _fill_process(cls, values: Any) -> Any:
        """Give a Gaussian path, which has no process, the default values that older versions stored."""
        values = expand_kind(values)
        is_gaussian = isinstance(values, dict) and values.get("kind") == "gaussian"
        return {**FORMER_DEFAULTS, **values} if is_gaussian else values

    def __str__(self) -> str:
        """Describe the path briefly, such as "kac a=9 c=3 linear". Different paths have different descriptions."""
        signal = "" if self.signal == "linear" else f" {self.signal} signal,"
        return "gaussian" if self.kind == "gaussian" else f"kac a={self.a:.15g} c={self.c:.15g}{signal} {self.clock}"

    def build(self) -> Path:
        """Return the path that these values describe."""
        if self.kind == "gaussian":
            return GaussianPath()
        return KacPath(KacProcess(self.a, self.c), self.signal, self.clock)


def _per_sample(t: Tensor, x: Tensor) -> Tensor:
    if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x))):
        raise ValueError(f"`t` has shape {list(t.shape)}, but x has shape {list(x.shape)}. Use a scalar or [{len(x)}].")
    return t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
