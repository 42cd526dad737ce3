"""The teacher's flow-matching loss (design: arXiv 2509.21513, section on conditional flow matching), and its draws."""

import torch
from torch import Tensor

from kac.networks import VelocityNetwork
from kac.path import Path


def flow_matching_loss(
    network: VelocityNetwork, path: Path, x_0: Tensor, t: Tensor, label: Tensor, generator: torch.Generator
) -> Tensor:
    """E || u_theta(x_t, t, label) - u_t ||^2 per coordinate; a scalar.

    Args:
        x_0: [batch, *sample] in [-1, 1]. t: [batch] in [0, 1], uniform. label: [batch], some dropped.
        generator: of the path's noise, on the device of ``x_0``.
    """
    point = path.sample(x_0, t, generator)
    return (network(point.x_t, t, label) - point.target).square().mean()


def even_times(count: int, generator: torch.Generator) -> Tensor:
    """Uniform times in (0, 1), one in each of ``count`` even strata, in random order: [count].

    Each is uniform, and their spread over a batch adds nothing to the noise of the loss.
    """
    strata = torch.randperm(count, generator=generator)
    return (strata + torch.rand(count, generator=generator)) / count


def drop_labels(label: Tensor, is_dropped: Tensor, null_label: int) -> Tensor:
    """``label`` [batch] with the null label, which guidance needs, where ``is_dropped`` [batch] says so."""
    return torch.where(is_dropped, torch.full_like(label, null_label), label)


def flip(images: Tensor, is_flipped: Tensor) -> Tensor:
    """Images [batch, channels, height, width], mirrored left to right where ``is_flipped`` [batch] says so."""
    return torch.where(is_flipped[:, None, None, None], images.flip(-1), images)
