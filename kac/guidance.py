"""Classifier-free guidance in velocity space: the only copy of the formula."""

import torch
from torch import Tensor

from kac.networks import VelocityNetwork
from kac.solvers import Velocity


class GuidedVelocity:
    """u_w = (1 + w) u(x, t, label) - w u(x, t, null); w = 0 is no guidance (arXiv 2509.21513).

    Attributes:
        nfe_per_call: network evaluations a call costs: 1 at w = 0, else 2 (one pass on a doubled batch).
    """

    def __init__(self, network: VelocityNetwork, w: float) -> None:
        self.network = network
        self.w = w
        self.nfe_per_call = 1 if w == 0 else 2

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x [batch, *sample], t scalar or [batch], label [batch] -> velocity [batch, *sample]."""
        if self.w == 0:
            return self.network(x, t, label)
        null = torch.full_like(label, self.network.null_label)
        t_doubled = t if t.ndim == 0 else torch.cat([t, t])
        u, u_null = self.network(torch.cat([x, x]), t_doubled, torch.cat([label, null])).chunk(2)
        return (1 + self.w) * u - self.w * u_null

    def given(self, label: Tensor) -> Velocity:
        """The field (x, t) -> velocity for these labels, as ``solvers.solve`` takes it."""
        return _Conditioned(self, label)


class _Conditioned:
    def __init__(self, velocity: GuidedVelocity, label: Tensor) -> None:
        self.velocity, self.label, self.nfe_per_call = velocity, label, velocity.nfe_per_call

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity(x, t, self.label)


def guide(network: VelocityNetwork, w: float) -> GuidedVelocity:
    """The network under guidance scale ``w``."""
    return GuidedVelocity(network, w)
