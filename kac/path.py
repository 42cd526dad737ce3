"""Paths between data (t = 0) and noise (t = 1): where a point is at time t, and the velocity to be learned."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from kac.clocks import CLOCKS, SIGNALS, ClockName, SignalName
from kac.process import KacProcess
from kac.util.errors import check_known
from kac.util.options import Kinded


class PathSample(NamedTuple):
    """Points on the path with their flow-matching targets."""

    x_t: Tensor  # [batch, *sample]
    target: Tensor  # [batch, *sample], the velocity u_t
    t: Tensor  # [batch]


@dataclass(frozen=True)
class KacPath:
    """x_t = f(t) x_0 + K_{g(t)}, every coordinate its own Kac process (arXiv 2509.21513).

    Raises:
        ValueError: an unknown signal or clock.
    """

    process: KacProcess = field(default_factory=KacProcess)
    signal: SignalName = "linear"
    clock: ClockName = "linear"
    uniforms_per_coordinate: ClassVar[int] = 3

    def __post_init__(self) -> None:
        check_known("signal", self.signal, SIGNALS)
        check_known("clock", self.clock, CLOCKS)

    def sample(self, x_0: Tensor, t: Tensor, generator: torch.Generator | None = None) -> PathSample:
        """Noise ``x_0`` [batch, *sample] to the times ``t`` [batch] in [0, 1].

        The target is u_t = f'(t) x_0 + g'(t) v(K, g(t)).
        """
        t_each = _per_sample(t, x_0)
        signal, clock = SIGNALS[self.signal].at(t_each), CLOCKS[self.clock].at(t_each)
        elapsed = clock.value.expand(x_0.shape)
        k = self.process.sample(elapsed, generator)
        v = self.process.velocity(k.displacement, elapsed, k.is_atom)
        target = signal.derivative * x_0 + clock.derivative * v
        return PathSample(signal.value * x_0 + k.displacement, target, t.expand(len(x_0)))

    def point(self, x_0: Tensor | float, t: float, uniforms: Tensor) -> Tensor:
        """x_t at one common time, from uniforms [3, *shape] in (0, 1) (float64): reproducible sample by sample."""
        time = torch.tensor(t, dtype=torch.float64)
        elapsed = CLOCKS[self.clock].at(time).value.item()
        return SIGNALS[self.signal].at(time).value * x_0 + self.process.from_uniforms(uniforms, elapsed)

    def speed_limit(self, data_bound: float = 1.0) -> float:
        """sup|f'| data_bound + c sup g': no component of the true velocity exceeds it for data in +-data_bound."""
        return SIGNALS[self.signal].slope_bound * data_bound + self.process.c * CLOCKS[self.clock].slope_bound


@dataclass(frozen=True)
class GaussianPath:
    """Ordinary flow matching behind the same interface: x_t = (1 - t) x_0 + t eps, u_t = eps - x_0."""

    uniforms_per_coordinate: ClassVar[int] = 1

    def sample(self, x_0: Tensor, t: Tensor, generator: torch.Generator | None = None) -> PathSample:
        """Noise ``x_0`` [batch, *sample] to the times ``t`` [batch] in [0, 1]."""
        eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)
        t_each = _per_sample(t, x_0)
        return PathSample((1 - t_each) * x_0 + t_each * eps, eps - x_0, t.expand(len(x_0)))

    def point(self, x_0: Tensor | float, t: float, uniforms: Tensor) -> Tensor:
        """x_t at one common time, from uniforms [1, *shape] in (0, 1) (float64): reproducible sample by sample."""
        return (1 - t) * x_0 + t * torch.special.ndtri(uniforms[0])  # type: ignore[no-any-return]

    def speed_limit(self, data_bound: float = 1.0) -> float:
        """Infinite: Gaussian noise has no bound."""
        return float("inf")


Path = KacPath | GaussianPath
"""What the teacher's loss, the rollout and the students need to know of the way between data and noise."""


class PathConfig(Kinded):
    """Which path, in plain values: what specs and checkpoints hold."""

    kind: Literal["kac", "gaussian"] = Field("kac", description="kac, or gaussian: ordinary flow matching")
    a: PositiveFloat = Field(9.0, description="reversal rate of the Kac process, 1/time")
    c: PositiveFloat = Field(3.0, description="speed of the Kac process, length/time")
    signal: SignalName = Field("linear", description="f(t), the share of the data: linear is 1 - t")
    clock: ClockName = Field("linear", description="g(t), the process's time: linear is t, quadratic t^2")

    def build(self) -> Path:
        """The path these values describe."""
        if self.kind == "gaussian":
            return GaussianPath()
        return KacPath(KacProcess(self.a, self.c), self.signal, self.clock)


def _per_sample(t: Tensor, x: Tensor) -> Tensor:
    if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x))):
        expected = f"t must be a scalar or of shape [{len(x)}] for x of shape {list(x.shape)}"
        raise ValueError(f"{expected}, got {list(t.shape)}")
    return t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
