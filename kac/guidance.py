"""Classifier-free guidance in velocity space: the only copy of the formula."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class VelocityModel(Protocol):
    """A class-conditional velocity field u(x, t, label) with a null label."""

    null_label: int

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x [batch, *sample], t scalar or [batch], label [batch] -> velocity [batch, *sample]."""
        ...


class GuidedVelocity:
    """u_w = (1 + w) u(x, t, label) - w u(x, t, null); w = 0 is no guidance (arXiv 2509.21513).

    Attributes:
        nfe_per_call: network evaluations a call costs: 1 at w = 0, else 2 (one pass on a doubled batch).
    """

    def __init__(self, model: VelocityModel, w: float) -> None:
        self.model = model
        self.w = w
        self.nfe_per_call = 1 if w == 0 else 2

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x [batch, *sample], t scalar or [batch], label [batch] -> velocity [batch, *sample]."""
        if self.w == 0:
            return self.model(x, t, label)
        null = torch.full_like(label, self.model.null_label)
        t_doubled = t if t.ndim == 0 else torch.cat([t, t])
        u, u_null = self.model(torch.cat([x, x]), t_doubled, torch.cat([label, null])).chunk(2)
        return (1 + self.w) * u - self.w * u_null

    def given(self, label: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The field (x, t) -> velocity for these labels, as ``solvers.solve`` takes it."""
        return _Conditioned(self, label)


class _Conditioned:
    def __init__(self, velocity: GuidedVelocity, label: Tensor) -> None:
        self.velocity, self.label, self.nfe_per_call = velocity, label, velocity.nfe_per_call

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity(x, t, self.label)


def guide(model: VelocityModel, w: float) -> GuidedVelocity:
    """The model under guidance scale ``w``."""
    return GuidedVelocity(model, w)
