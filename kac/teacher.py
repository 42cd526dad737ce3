"""The teacher's flow-matching loss (design: arXiv 2509.21513, section on conditional flow matching)."""

import torch
from torch import Tensor

from kac.networks import VelocityNetwork
from kac.path import Path


def flow_matching_loss(
    network: VelocityNetwork, path: Path, x_0: Tensor, label: Tensor, generator: torch.Generator, label_dropout: float
) -> Tensor:
    """E || u_theta(x_t, t, label) - u_t ||^2 per coordinate, t uniform in (0, 1); a scalar.

    Args:
        x_0: [batch, *sample] in [-1, 1]. label: [batch].
        label_dropout: the share of labels replaced by the null label, which guidance needs.
    """
    count, device = len(x_0), x_0.device
    # Even strata under one random offset each: t is uniform, and its spread over a batch adds nothing to the noise.
    strata = torch.randperm(count, generator=generator, device=device)
    t = (strata + torch.rand(count, generator=generator, device=device)) / count
    point = path.sample(x_0, t, generator)
    dropped = torch.rand(count, generator=generator, device=device) < label_dropout
    given = torch.where(dropped, torch.full_like(label, network.null_label), label)
    return (network(point.x_t, t, given) - point.target).square().mean()
