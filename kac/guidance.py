"""Classifier-free guidance in velocity space: the only copy of the formula."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kac.conditioning import NO_NULL_LABEL, why_no_guidance
from kac.model import ModelConfig
from kac.networks import VelocityNetwork
from kac.util.errors import ArgumentError


class GuidedVelocity:
    """u_w = (1 + w) u(x, t, label) - w u(x, t, null) for these labels, as ``solvers.solve`` takes it.

    w = 0 is no guidance (arXiv 2509.21513).

    Args:
        label: [batch]. conditions: t -> those that the network takes at that time, scalars.

    Attributes:
        nfe_per_call: network evaluations per call: 1 at w = 0, else 2 (one pass on a doubled batch).

    Raises:
        ArgumentError: guidance of a network without a null label.
    """

    def __init__(
        self,
        network: VelocityNetwork,
        w: float,
        label: Tensor,
        conditions: Callable[[Tensor], dict[str, Tensor]] = lambda t: {},
    ) -> None:
        if w != 0 and network.null_label is None:
            raise ArgumentError(_refusal(NO_NULL_LABEL, w))
        self.network, self.w, self.label, self.conditions = network, w, label, conditions
        self.nfe_per_call = 1 if w == 0 else 2

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x [batch, *sample], t scalar or [batch] -> velocity [batch, *sample]."""
        given = self.conditions(t)
        if self.w == 0:
            return self.network(x, t, self.label, **given)
        assert self.network.null_label is not None
        both = torch.cat([self.label, torch.full_like(self.label, self.network.null_label)])
        t_doubled = t if t.ndim == 0 else torch.cat([t, t])
        u, u_null = self.network(torch.cat([x, x]), t_doubled, both, **given).chunk(2)
        return (1 + self.w) * u - self.w * u_null


guide = GuidedVelocity
"""``guide(network, w, label)``: the network under guidance."""


def check_guidance(model: ModelConfig, scales: Iterable[float]) -> None:
    """Refuse guidance of a teacher for which it means nothing, before any work.

    Raises:
        ArgumentError: one of the guidance scales is not 0.
    """
    reason = why_no_guidance(model)
    guided = next((w for w in scales if w != 0), None)
    if reason and guided is not None:
        raise ArgumentError(_refusal(reason, guided))


def _refusal(reason: str, w: float) -> str:
    return f"`guidance` {w:g}: {reason}, so it cannot be guided. Choose `guidance` 0."
