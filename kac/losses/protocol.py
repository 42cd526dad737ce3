"""The interface of objectives: the knots to read, the intervals to draw, the losses and the diagnostics."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from kac.networks import Condition, VelocityNetwork
from kac.util.errors import ArgumentError


class Interval(NamedTuple):
    """A batch of pairs of teacher states. The two states of a pair belong to the same trajectory."""

    x_start: Tensor  # [batch, *sample], float32
    x_end: Tensor  # [batch, *sample]
    t_start: Tensor  # [batch], float32
    t_end: Tensor  # [batch], less than t_start
    label: Tensor  # [batch], int64
    guidance: Tensor  # [batch], float32, the guidance scale of the trajectory

    def mean_velocity(self) -> Tensor:
        """(x_start - x_end) / (t_start - t_end), [batch, *sample]: the velocity that reaches x_end in one step."""
        h = (self.t_start - self.t_end).reshape(-1, *[1] * (self.x_start.ndim - 1))
        return (self.x_start - self.x_end) / h

    def conditions(self, names: Sequence[Condition]) -> dict[str, Tensor]:
        """Values of the network inputs ``names``, [batch] each."""
        values: dict[Condition, Tensor] = {"end_time": self.t_end, "guidance": self.guidance}
        return {name: values[name] for name in names}


@dataclass(frozen=True)
class LossTerms:
    """Scalars of a batch by name. Every pass of an update has the same names. Logged as means over passes and workers.

    Attributes:
        losses: parts of the training loss, logged as ``loss/NAME``. Training minimises their sum.
        diagnostics: only logged, as ``diagnostic/NAME``. They need no declaration and have no effect on training.
    """

    losses: dict[str, Tensor]
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A training objective for students."""

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Inputs of the student's network besides time and label."""
        ...

    def knots(self, stored: int) -> range:
        """The knots to read from a store with the knots 0 .. ``stored``.

        Raises:
            ArgumentError: the store lacks these knots.
        """
        ...

    def draw(self, uniforms: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Random intervals: their start and end as positions in ``knots``, [batch] each, int64.

        Args:
            uniforms: [batch, 2] in (0, 1), float64.
            stored: last knot of the store.
        """
        ...

    def losses(self, network: VelocityNetwork, interval: Interval) -> LossTerms:
        """The losses of a batch, and diagnostics to log."""
        ...


def check_divides_knots(argument: str, steps: int, stored: int) -> None:
    """Check that ``steps`` student steps start and end on knots of a store with ``stored`` intervals.

    Raises:
        ArgumentError: ``steps`` does not divide ``stored``. The message names the argument.
    """
    if steps < 1 or stored % steps:
        *divisors, last = [str(m) for m in range(1, stored + 1) if stored % m == 0]
        choices = f"{', '.join(divisors)} or {last}" if divisors else last
        raise ArgumentError(f"`{argument}` {steps} does not divide the store's {stored} knots. Choose {choices}.")
