"""Helpers of the networks from diffusers: labels with conditions, scaled times, and images folded into patches."""

import torch
from torch import Tensor, nn

from kac.util.errors import ArgumentError


class ConditionedLabels(nn.Embedding):
    """The class embedding of a diffusers model, plus the embedding of the conditions.

    A diffusers model passes its ``class_labels`` to this module unchanged. The networks here pass
    ``(label [batch], condition [batch or 1, width])``; users of diffusers pass plain labels. The weights have the same
    name as in the embedding that this module replaces.
    """

    def forward(self, labels: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """Return the embedding of labels and conditions: [batch, width]."""
        if isinstance(labels, Tensor):
            return super().forward(labels)
        label, condition = labels
        return super().forward(label) + condition


def diffusers_time(x: Tensor, t: Tensor, scale: float) -> Tensor:
    """Return ``scale`` * t as one time per sample of x: [batch]. t is a scalar or [batch], in [0, 1]."""
    return (scale * t.to(torch.float32)).expand(len(x))


def folded_shape(patch: int, sample_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the channels and the width of square images after folding patch x patch pixels into channels.

    Raises:
        ArgumentError: the samples are not square images, or ``patch`` does not divide their width.
    """
    if len(sample_shape) != 3 or sample_shape[1] != sample_shape[2]:
        raise ArgumentError(
            f"This `network` needs square images [channels, width, width], but the samples have shape "
            f"{list(sample_shape)}. Use `network` mlp."
        )
    channels, width = sample_shape[0], sample_shape[1]
    if width % patch:
        raise ArgumentError(f"`network.patch` {patch} does not divide the image width {width}. Choose a divisor.")
    return channels * patch**2, width // patch
