"""A residual MLP for small images and points."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from kac.networks.velocity import ConditionEmbedding, FourierFeatures, NetworkModule, NetworkOptions

CONDITION_WIDTH = 64
"""Width of the embedding of time and class. Using ``width`` instead costs a quarter more and is no better."""


class MLPConfig(NetworkOptions):
    """Options of a residual MLP over the flattened sample, for small images and points."""

    kind: Literal["mlp"] = Field("mlp", description="mlp: residual MLP, for small images and points")
    width: PositiveInt = Field(192, description="width of the residual stream")
    depth: PositiveInt = Field(3, description="number of residual blocks")


class ResidualMLP(NetworkModule):
    """A residual MLP. Time and class scale and shift the input of each block (adaLN)."""

    def __init__(self, config: MLPConfig, sample_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.null_label, self.takes = num_classes, config.conditions
        size, width, inner = math.prod(sample_shape), config.width, CONDITION_WIDTH
        self.time = nn.Sequential(FourierFeatures(inner), nn.Linear(inner, inner), nn.SiLU())
        self.label = nn.Embedding(num_classes + 1, inner)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.depth))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))
        self.conditions = ConditionEmbedding(config.conditions, inner)
        nn.init.normal_(self.label.weight, std=0.5)
        nn.init.zeros_(self.leave[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.leave[1].bias)  # type: ignore[arg-type]

    def feature_layers(self) -> Sequence[nn.Module]:
        """Return the blocks."""
        return list(self.blocks)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        """Return the velocity at x [batch, *sample_shape], t (scalar or [batch]) and label [batch], 0 .. null_label."""
        embedding = self.time(t.to(x.dtype).reshape(-1)) + self.label(label)
        condition = nn.functional.silu(self.conditions(embedding, conditions))
        hidden = self.enter(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.leave(hidden).reshape(x.shape)  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(CONDITION_WIDTH, 2 * width)
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition).chunk(2, dim=1)
        return hidden + self.net(self.norm(hidden) * (1 + scale) + shift)  # type: ignore[no-any-return]
