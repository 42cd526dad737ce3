"""Code that the networks from diffusers share: label embeddings with conditions, scaled times, and folded images."""

from typing import Any

import torch
from torch import Tensor, nn

from kac.networks.velocity import ConditionEmbedding, NetworkModule
from kac.util.errors import ArgumentError


class ConditionedLabels(nn.Embedding):
    """The class embedding of a diffusers model, plus the embedding of the conditions.

    A diffusers model passes its ``class_labels`` to this module unchanged. This project's networks
    pass ``(label [batch], condition [batch or 1, width])``. Users of diffusers pass plain labels. This module replaces
    the embedding that diffusers creates, and keeps the name of the embedding's weight.
    """

    def forward(self, labels: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """Return the sum of the label embedding and the condition embedding: [batch, width]."""
        if isinstance(labels, Tensor):
            return super().forward(labels)
        label, condition = labels
        return super().forward(label) + condition


class InputConv2d(nn.Conv2d):
    """A network's first layer, which computes in float32 even under autocast.

    bfloat16 rounds pixels near -1 and 1 to multiples of half a grey level, which hides the last noise of an image.
    Networks change the class of diffusers' first layer to this one, which keeps its weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution in autocast's data type, like other layers."""
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):  # "meta" has no autocast
            return super().forward(x)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return super().forward(x).to(dtype)


class DiffusersNetwork(NetworkModule):
    """Wraps a diffusers model as a velocity network. The model is the submodule ``diffusers_name``."""

    diffusers_name: str
    conditions: ConditionEmbedding
    width: int  # width of the embedding of time and class

    def __init__(self, config: Any, num_classes: int, width: int) -> None:
        super().__init__()
        self.null_label, self.takes = num_classes, config.conditions
        self.time_scale, self.width = config.time_scale, width

    def forward(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        """Return the velocity at x [batch, channels, side, side], t (scalar or [batch]) and label [batch]."""
        given = (label, self.conditions(x.new_zeros(1, self.width), conditions))
        times = (self.time_scale * t.to(torch.float32)).expand(x.shape[0])  # len(x) would fix an exported batch size
        return getattr(self, self.diffusers_name)(x, times, given).sample  # type: ignore[no-any-return]


def folded_shape(patch: int, sample_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of channels and the width of square images after folding patch x patch pixels into channels.

    Raises ``ArgumentError`` if the samples are not square images, or ``patch`` does not divide their width.
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
