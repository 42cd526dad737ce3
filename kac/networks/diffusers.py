"""What the networks from diffusers have in common: how they get times, labels, conditions, and images as patches."""

import torch
from torch import Tensor, nn

from kac.util.errors import ArgumentError


class ConditionedLabels(nn.Embedding):
    """The class embedding of a diffusers model, which hands on whatever it is given as ``class_labels``.

    It is given ``(label [batch], condition [batch or 1, width])`` here, and plain labels by those who load the model
    with diffusers alone. The name of its weights stays that of the embedding it replaces.
    """

    def forward(self, labels: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """The embedding of the labels, with that of the conditions added: [batch, width]."""
        if isinstance(labels, Tensor):
            return super().forward(labels)
        label, condition = labels
        return super().forward(label) + condition


def diffusers_time(x: Tensor, t: Tensor, scale: float) -> Tensor:
    """Times t, scalar or [batch] in [0, 1], for the samples x as the time embeddings of diffusers expect: [batch]."""
    return (scale * t.to(torch.float32)).expand(len(x))


def folded_shape(patch: int, sample_shape: tuple[int, ...]) -> tuple[int, int]:
    """Channels and width of square images once patches of ``patch`` pixels squared have become channels.

    Raises:
        ArgumentError: no square images, or a patch that does not divide their width.
    """
    if len(sample_shape) != 3 or sample_shape[1] != sample_shape[2]:
        raise ArgumentError(
            f"`network`: expected square images [channels, width, width] for this kind, found samples of shape "
            f"{list(sample_shape)}: use `network` mlp"
        )
    channels, width = sample_shape[0], sample_shape[1]
    if width % patch:
        raise ArgumentError(f"`network.patch`: expected a divisor of the image width {width}, found {patch}")
    return channels * patch**2, width // patch
