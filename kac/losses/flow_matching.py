"""The flow-matching loss of a teacher (arXiv 2509.21513, conditional flow matching) and its random inputs."""

import torch
from torch import Tensor

from kac.networks import VelocityNetwork
from kac.path import Path


def flow_matching_loss(
    network: VelocityNetwork, path: Path, x_0: Tensor, t: Tensor, label: Tensor, generator: torch.Generator
) -> Tensor:
    """Return E || u_theta(x_t, t, label) - u_t ||^2 per coordinate, a scalar.

    Example:
        >>> from kac import KacPath
        >>> from kac.networks import MLPConfig, build_network
        >>> network = build_network(MLPConfig(width=8, depth=1), (2,), num_classes=3)
        >>> generator = torch.Generator().manual_seed(0)
        >>> x_0, t, label = torch.zeros(16, 2), stratified_times(16, generator), torch.zeros(16, dtype=torch.long)
        >>> flow_matching_loss(network, KacPath(), x_0, t, label, generator).shape
        torch.Size([])

    Args:
        x_0: [batch, *sample] in [-1, 1].
        t: [batch], uniform in [0, 1].
        label: [batch]; may contain null labels.
        generator: generator of the path's noise, on the same device as ``x_0``.
    """
    point = path.sample(x_0, t, generator)
    return (network(point.x_t, t, label) - point.target).square().mean()


def stratified_times(count: int, generator: torch.Generator) -> Tensor:
    """Draw a uniform time from each of ``count`` equal intervals, in random order: [count]. Strata reduce variance."""
    strata = torch.randperm(count, generator=generator)
    return (strata + torch.rand(count, generator=generator)) / count


def drop_labels(label: Tensor, is_dropped: Tensor, null_label: int) -> Tensor:
    """Replace ``label`` [batch] with the null label where ``is_dropped`` [batch] is true, to train for guidance."""
    return torch.where(is_dropped, torch.full_like(label, null_label), label)


def flip(images: Tensor, is_flipped: Tensor) -> Tensor:
    """Mirror images [batch, channels, height, width] horizontally where ``is_flipped`` [batch] is true."""
    return torch.where(is_flipped[:, None, None, None], images.flip(-1), images)
