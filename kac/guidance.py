"""Classifier-free guidance in velocity space: the only copy of the formula."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kac.networks import NetworkConfig, VelocityNetwork
from kac.options import OptionError


class GuidedVelocity:
    """u_w = (1 + w) u(x, t, label) - w u(x, t, null) for these labels, as ``solvers.solve`` takes it.

    w = 0 is no guidance (arXiv 2509.21513).

    Args:
        label: [batch]. conditions: t -> those that the network takes at that time, scalars.

    Attributes:
        nfe_per_call: network evaluations per call: 1 at w = 0, else 2 (one pass on a doubled batch).

    Raises:
        OptionError: guidance of a network without a null label.
    """

    def __init__(
        self,
        network: VelocityNetwork,
        w: float,
        label: Tensor,
        conditions: Callable[[Tensor], dict[str, Tensor]] = lambda t: {},
    ) -> None:
        if w != 0 and network.null_label is None:
            raise OptionError(_no_null_label(w))
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


def check_guidance(network: NetworkConfig, scales: Iterable[float]) -> None:
    """Refuse guidance of a network without a null label, before any work.

    Raises:
        OptionError: one of the guidance scales is not 0.
    """
    for w in scales:
        if w != 0 and not network.has_null_label:
            raise OptionError(_no_null_label(w))


def _no_null_label(w: float) -> str:
    return f"--guidance: expected 0, since this network has no null label (it knows classes alone), found {w:g}"
