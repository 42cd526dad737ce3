"""Training objectives of students. An objective chooses the knots to read, draws intervals, and computes losses.

To add an objective, write its config and its ``Objective`` in this module, and add the config to ``OBJECTIVES``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field, PositiveInt
from torch import Tensor
from torch.nn.functional import avg_pool2d

from kac.networks import Condition, VelocityNetwork
from kac.util.errors import ArgumentError
from kac.util.options import Kinded, expand_kind

LossName = Literal["mse", "huber"]
PairLaw = Literal["grids", "any", "length", "long"]

GRID_SHARE = 0.75
"""Fraction of knot pairs drawn from the student's steps in ``grids``. The others train the map between these grids."""

SHORTEST_PART = 0.02
"""The shortest part of a line that reflow trains on."""

HUBER_SCALE = 0.03
"""c / sqrt(d) in the pseudo-Huber loss, where d is a sample's number of coordinates.

This value is far smaller than a velocity's coordinates (about 1), so most samples have gradients of equal norm.
arXiv 2310.14189 uses c = 0.00054 sqrt(d) for errors that are about a hundred times smaller.
"""


LENGTH_DRAWS = 100_000
"""Number of intervals whose mean length is measured."""


class Interval(NamedTuple):
    """A batch of pairs of teacher states. The two states of a pair belong to the same trajectory."""

    x_start: Tensor  # [batch, *sample], float32
    x_end: Tensor  # [batch, *sample]
    t_start: Tensor  # [batch], float32
    t_end: Tensor  # [batch], less than t_start
    label: Tensor  # [batch], int64
    guidance: Tensor  # [batch], float32, the guidance scale of the trajectory


@dataclass(frozen=True)
class LossTerms:
    """Named scalars of a batch. All passes of an update have the same names. Means over passes and workers are logged.

    Attributes:
        losses: parts of the training loss, logged as ``loss/NAME``. Training minimises the sum of all parts.
        diagnostics: values that are only logged, as ``diagnostic/NAME``. Diagnostics have no effect on training.
    """

    losses: dict[str, Tensor]
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


class VelocityErrorOptions(Kinded):
    """Options of losses that measure the velocity error."""

    is_any_step: ClassVar[bool] = True  # whether one student works with any number of steps
    loss: LossName = Field("mse", description="mse: mean squared error; huber: pseudo-Huber, linear for large errors")
    scales: PositiveInt = Field(
        1, description="number of image sizes over which the loss is averaged; each size is half of the previous size"
    )


class EndpointConfig(VelocityErrorOptions):
    """Options of endpoint distillation."""

    is_any_step = False
    kind: Literal["endpoint"] = Field("endpoint", description="endpoint: match the teacher at the end of each step")

    def build(self, steps: int, takes: tuple[Condition, ...] = ()) -> "EndpointObjective":
        """Return the objective of a student with ``steps`` steps whose network takes the conditions ``takes``."""
        return EndpointObjective(steps, conditions=takes, loss=self.loss, scales=self.scales)


class FlowMapConfig(VelocityErrorOptions):
    """Options of flow-map distillation."""

    kind: Literal["flow-map"] = Field("flow-map", description="flow-map: one student for any number of steps")
    pairs: PairLaw = Field(
        "grids",
        description="distribution of knot pairs; grids: 3/4 are student steps of `grids`, 1/4 are uniform; "
        "any: uniform over pairs; length: uniform over lengths; long: probability proportional to length",
    )
    grids: tuple[PositiveInt, ...] = Field(
        (1, 2, 4, 20), min_length=1, description="step counts to favour; each must divide the number of stored knots"
    )

    def build(self, steps: int, takes: tuple[Condition, ...] = ()) -> "FlowMapObjective":
        """Return the objective of a student whose network takes the end time and ``takes``. ``steps`` has no effect."""
        conditions = ("end_time", *takes)
        return FlowMapObjective(self.pairs, self.grids, conditions=conditions, loss=self.loss, scales=self.scales)


class ReflowConfig(VelocityErrorOptions):
    """Options of reflow."""

    kind: Literal["reflow"] = Field(
        "reflow", description="reflow: straight lines from noise to the teacher's images; for any number of steps"
    )

    def build(self, steps: int, takes: tuple[Condition, ...] = ()) -> "ReflowObjective":
        """Return the objective of a student whose network takes the end time and ``takes``. ``steps`` has no effect."""
        return ReflowObjective(conditions=("end_time", *takes), loss=self.loss, scales=self.scales)


OBJECTIVES = EndpointConfig | FlowMapConfig | ReflowConfig
"""The configs of all objectives. A config's ``build`` method returns its ``Objective``."""

ObjectiveConfig = Annotated[
    OBJECTIVES,
    Field(discriminator="kind", description="training objective of the student"),
    BeforeValidator(expand_kind),
]
"""The config of any objective. The string "flow-map" is short for a ``FlowMapConfig`` with default values."""


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A training objective for students.

    Attributes:
        conditions: inputs of the student's network besides time and label.
        loss, scales: as in ``endpoint_loss``.
    """

    name: ClassVar[str]  # name of the objective's loss
    conditions: tuple[Condition, ...] = ()
    loss: LossName = "mse"
    scales: int = 1

    @abstractmethod
    def knots(self, stored: int) -> range:
        """Return the knots to read, from 0 .. ``stored``. Raises ``ArgumentError`` if the store lacks some knots."""

    @abstractmethod
    def draw(self, uniforms: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Draw random intervals. Return their starts and their ends as positions in ``knots``: [batch] each, int64.

        Args:
            uniforms: [batch, 2] in (0, 1), float64.
            stored: index of the store's last knot.
        """

    def mean_length(self, stored: int) -> float:
        """Return the mean length of the intervals in knots, divided by ``stored``. It is exact to about 1e-5."""
        uniforms = torch.rand(LENGTH_DRAWS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        uniforms[:, 0] = (torch.arange(LENGTH_DRAWS) + 0.5) / LENGTH_DRAWS
        start, end = self.draw(uniforms, stored)
        knots = torch.tensor(self.knots(stored), dtype=torch.float64)
        return (knots[end] - knots[start]).mean().item() / stored

    def losses(self, network: VelocityNetwork, interval: Interval) -> LossTerms:
        """Return the losses of a batch, and the diagnostics to log."""
        return LossTerms({self.name: endpoint_loss(network, interval, self.loss, self.scales, self.conditions)})


@dataclass(frozen=True)
class EndpointObjective(Objective):
    """Match the teacher at the end of each of the student's ``steps`` Euler steps (arXiv 2509.21513)."""

    name = "endpoint"
    steps: int

    def knots(self, stored: int) -> range:
        """Return every ``stored / steps``-th knot."""
        _check_divides_knots("steps", self.steps, stored)
        return range(0, stored + 1, stored // self.steps)

    def draw(self, uniforms: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Draw one of the ``steps`` intervals with equal probability: [batch, 2] -> k and k + 1."""
        k = (uniforms[:, 0] * self.steps).long()
        return k, k + 1


@dataclass(frozen=True)
class FlowMapObjective(Objective):
    """Learn to step from any knot of a trajectory to any later knot. One student then works with any number of steps.

    The student's u(x_s, s, r) is the mean velocity from time s to time r, so one step is x_r = x_s - (s - r) u. A
    training pair is two stored knots of one trajectory. The target is the chord (x_s - x_r) / (s - r), which needs no
    network call and obeys any speed limit that the trajectory obeys. At r = s, u equals the teacher's velocity, so
    the student starts from the teacher's weights and initially ignores the end time. Related methods learn flow maps
    without stored trajectories (arXiv 2505.18825; TCD, 2402.19159; CMT, 2509.24526).
    """

    name = "flow_map"
    pairs: PairLaw = "grids"
    grids: tuple[int, ...] = (1, 2, 4, 20)
    conditions: tuple[Condition, ...] = field(default=("end_time",), kw_only=True)

    def knots(self, stored: int) -> range:
        """Return all stored knots."""
        for steps in self.grids if self.pairs == "grids" else ():
            _check_divides_knots("objective.grids", steps, stored)
        return range(stored + 1)

    def draw(self, uniforms: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Draw two knots from the distribution ``pairs``: [batch, 2] -> i and j > i."""
        i, j = torch.triu_indices(stored + 1, stored + 1, offset=1)
        cumulative = pair_probabilities(self.pairs, self.grids, stored)[i, j].cumsum(0)
        pair = torch.searchsorted(cumulative, uniforms[:, 0].contiguous() * cumulative[-1], right=True)
        pair = pair.clamp(max=len(i) - 1)
        return i[pair], j[pair]


@dataclass(frozen=True)
class ReflowObjective(Objective):
    """Learn the velocity of straight lines from the noise to the teacher's image (rectified flow, arXiv 2209.03003).

    On a line, the mean velocity between any two times is the same. The student takes the end time as a flow map does,
    and works with any number of steps. Lines of different trajectories cross, so the student learns a mean of their
    velocities, and needs several steps to be accurate.
    """

    name = "reflow"
    conditions: tuple[Condition, ...] = field(default=("end_time",), kw_only=True)

    def knots(self, stored: int) -> range:
        """Return the first and the last knot."""
        return range(0, stored + 1, stored)

    def draw(self, uniforms: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Return the ends of the trajectories: [batch, 2] -> 0 and 1."""
        start = torch.zeros(len(uniforms), dtype=torch.long)
        return start, start + 1

    def losses(self, network: VelocityNetwork, interval: Interval) -> LossTerms:
        """Return the losses of random parts of the lines, whose times come from PyTorch's global generator."""
        u, v = torch.rand(2, len(interval.label), device=interval.label.device, dtype=interval.x_start.dtype)
        t_start = SHORTEST_PART + (1 - SHORTEST_PART) * u
        t_end = (t_start - SHORTEST_PART) * v

        def point(t: Tensor) -> Tensor:
            return torch.lerp(interval.x_end, interval.x_start, t.reshape(-1, *[1] * (interval.x_end.ndim - 1)))

        part = interval._replace(x_start=point(t_start), x_end=point(t_end), t_start=t_start, t_end=t_end)
        return super().losses(network, part)


def endpoint_loss(
    network: VelocityNetwork,
    interval: Interval,
    loss: LossName = "mse",
    scales: int = 1,
    conditions: Sequence[Condition] = (),
) -> Tensor:
    """Return || x_start - h u_student(x_start, t_start, label) - x_end ||^2 / h^2 per coordinate, h = t_start - t_end.

    Division by h^2 gives a velocity error, which is comparable across intervals and step counts.

    Example:
        >>> import torch
        >>> from kac.losses import Interval
        >>> from kac.networks import MLPConfig, build_network
        >>> network = build_network(MLPConfig(width=8, depth=1), (2,), num_classes=3)
        >>> start, end, label = torch.zeros(4, 2), torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
        >>> interval = Interval(start, end, torch.ones(4), torch.zeros(4), label, guidance=torch.zeros(4))
        >>> endpoint_loss(network, interval).shape
        torch.Size([])

    Args:
        loss: ``mse`` is the mean square of the velocity error; ``huber`` is sqrt(mean square + c^2) - c per sample.
        scales: number of losses to average. The losses use the error pooled over 1x1, 2x2, 4x4, ... pixels.
        conditions: inputs of the network besides time and label.

    Raises:
        ArgumentError: the images are too small for ``scales``.
    """
    x, t, values = interval.x_start, interval.t_start, {"end_time": interval.t_end, "guidance": interval.guidance}
    h = (t - interval.t_end).reshape(-1, *[1] * (x.ndim - 1))
    u = network(x, t, interval.label, **{name: values[name] for name in conditions})
    error = u - (x - interval.x_end) / h
    if scales > 1 and (x.ndim != 4 or min(x.shape[2:]) >> (scales - 1) == 0):
        problem = f"samples of shape {list(x.shape[1:])} cannot be halved {scales - 1} times"
        raise ArgumentError(f"`objective.scales` {scales} is too large: {problem}. Choose a smaller value.")
    total = VELOCITY_LOSSES[loss](error)
    for _ in range(scales - 1):
        error = avg_pool2d(error, 2)
        total = total + VELOCITY_LOSSES[loss](error)
    return total / scales


def _pseudo_huber(error: Tensor) -> Tensor:
    mean_square = error.square().flatten(1).mean(1)
    return ((mean_square + HUBER_SCALE**2).sqrt() - HUBER_SCALE).mean()


VELOCITY_LOSSES: dict[LossName, Callable[[Tensor], Tensor]] = {
    "mse": lambda error: error.square().mean(),
    "huber": _pseudo_huber,
}


def pair_probabilities(law: PairLaw, grids: tuple[int, ...], stored: int) -> Tensor:
    """Return the probability of each knot pair: [stored + 1, stored + 1], float64, zero on and below the diagonal."""
    knot = torch.arange(stored + 1, dtype=torch.float64)
    length = (knot[None, :] - knot[:, None]).clamp(min=0)
    is_pair = (length > 0).double()
    any_pair = is_pair / is_pair.sum()
    if law == "any":
        return any_pair
    if law == "length":
        return is_pair / (stored + 1 - length) / stored
    if law == "long":
        return length / length.sum()
    on_grids = torch.zeros_like(any_pair)
    for steps in grids:
        ends = torch.arange(0, stored + 1, stored // steps)
        on_grids[ends[:-1], ends[1:]] += 1 / (steps * len(grids))
    return GRID_SHARE * on_grids + (1 - GRID_SHARE) * any_pair


def _check_divides_knots(argument: str, steps: int, stored: int) -> None:
    """Raise ``ArgumentError`` unless all of the ``steps`` student steps start and end on stored knots."""
    if steps < 1 or stored % steps:
        divisors = ", ".join(str(m) for m in range(1, stored + 1) if stored % m == 0)
        raise ArgumentError(f"`{argument}` {steps} does not divide the store's {stored} knots. Choose {divisors}.")
