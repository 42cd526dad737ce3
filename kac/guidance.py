"""Guidance of velocities, by the null label or by a guide. This is the only module that contains the formula."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kac.conditioning import NO_NULL_LABEL, guidance_problem
from kac.model import ModelConfig
from kac.networks import VelocityNetwork
from kac.util.errors import ArgumentError


class GuidedVelocity:
    """The guided velocity u_w = (1 + w) u(x, t, label) - w u(x, t, null) for fixed labels (arXiv 2509.21513).

    If the network has a guide, a weaker network of the same kind, then the guide's velocity u_guide(x, t, label)
    replaces u(x, t, null) (autoguidance, arXiv 2406.02507). w = 0 means no guidance. ``solvers.solve`` can integrate
    this velocity.

    Example:
        >>> from kac.networks import MLPConfig, build_network
        >>> network = build_network(MLPConfig(width=8, depth=1), (2,), num_classes=3)
        >>> velocity = guide(network, w=1.5, label=torch.tensor([0, 2]))
        >>> velocity(torch.zeros(2, 2), torch.tensor(0.5)).shape, velocity.nfe_per_call
        (torch.Size([2, 2]), 2)

    Args:
        label: [batch].
        conditions: function that maps t to the network's other inputs, a dictionary of scalars by name.
        time_factor: the networks receive this factor times t.

    Attributes:
        nfe_per_call: network evaluations per call: 1 if w = 0, otherwise 2 (with the null label, in one pass over a
            doubled batch).

    Raises:
        ArgumentError: w is not 0, but the network has neither a guide nor a null label.
    """

    def __init__(
        self,
        network: VelocityNetwork,
        w: float,
        label: Tensor,
        conditions: Callable[[Tensor], dict[str, Tensor]] = lambda t: {},
        time_factor: float = 1.0,
    ) -> None:
        self.guide: VelocityNetwork | None = getattr(network, "guide", None)
        _check("" if self.guide or network.null_label is not None else NO_NULL_LABEL, [w])
        self.network, self.w, self.label, self.conditions = network, w, label, conditions
        self.time_factor, self.nfe_per_call = time_factor, 1 if w == 0 else 2

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity [batch, *sample] at x [batch, *sample] and t, a scalar or [batch]."""
        conditions, t = self.conditions(t), self.time_factor * t
        if self.w == 0:
            return self.network(x, t, self.label, **conditions)
        if self.guide is not None:
            u, weaker = self.network(x, t, self.label), self.guide(x, t, self.label)
        else:
            assert self.network.null_label is not None
            labels = torch.cat([self.label, torch.full_like(self.label, self.network.null_label)])
            t_doubled = t if t.ndim == 0 else torch.cat([t, t])
            u, weaker = self.network(torch.cat([x, x]), t_doubled, labels, **conditions).chunk(2)
        return (1 + self.w) * u - self.w * weaker


guide = GuidedVelocity
"""``guide(network, w, label)`` returns a network's guided velocity."""


def check_guidance(model: ModelConfig, scales: Iterable[float]) -> None:
    """Check that a teacher supports the guidance ``scales``.

    Raises:
        ArgumentError: a scale is not 0, but the teacher cannot be guided.
    """
    _check(guidance_problem(model), scales)


def _check(problem: str, scales: Iterable[float]) -> None:
    guided = next((w for w in scales if w != 0), None)
    if problem and guided is not None:
        raise ArgumentError(
            f"`guidance` {guided:g} is impossible, because {problem}. Choose `guidance` 0, or train the teacher with "
            "`guide_updates`."
        )
