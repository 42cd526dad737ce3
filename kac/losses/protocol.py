"""What an objective is: which knots it reads, which intervals between them, and the parts of its loss."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from kac.networks import Condition, VelocityNetwork


class Interval(NamedTuple):
    """A batch of pairs of states on the teacher's trajectories, each pair from one trajectory."""

    x_start: Tensor  # [batch, *sample], float32
    x_end: Tensor  # [batch, *sample]
    t_start: Tensor  # [batch], float32
    t_end: Tensor  # [batch], below t_start
    label: Tensor  # [batch], int64
    guidance: Tensor  # [batch], float32: the scale at which the teacher made each pair

    def mean_velocity(self) -> Tensor:
        """(x_start - x_end) / (t_start - t_end), [batch, *sample]: the velocity that lands in one step."""
        h = (self.t_start - self.t_end).reshape(-1, *[1] * (self.x_start.ndim - 1))
        return (self.x_start - self.x_end) / h

    def conditions(self, names: Sequence[Condition]) -> dict[str, Tensor]:
        """What a network that takes these beside time and label is given for the step: [batch] each."""
        known: dict[Condition, Tensor] = {"end_time": self.t_end, "guidance": self.guidance}
        return {name: known[name] for name in names}


class Objective(Protocol):
    """What a student learns."""

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What the student's network must take in beside time and label."""
        ...

    def knots(self, stored: int) -> range:
        """Which of the store's knots 0 .. ``stored`` it reads.

        Raises:
            ArgumentError: the store has no such knots.
        """
        ...

    def draw(self, uniforms: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Random intervals: where they start and end, as positions in ``knots``, each [batch] int64.

        Args:
            uniforms: [batch, 2] in (0, 1), float64.
            stored: the store has the knots 0 .. ``stored``.
        """
        ...

    def losses(self, network: VelocityNetwork, interval: Interval) -> dict[str, Tensor]:
        """The parts of the loss by name, scalars; what is minimised is their sum."""
        ...
