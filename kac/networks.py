"""Velocity networks: ``model(x, t, label) -> velocity``, class-conditional with a null class for guidance."""

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from kac.options import Options

CONDITION_WIDTH = 64
"""Width of the embedding of time and class: as good as the stream's own width, and a quarter cheaper."""


class NetworkConfig(Options):
    """The shape of a network: all that is needed to build it again."""

    kind: Literal["mlp"] = Field("mlp", description="residual MLP over the flattened sample, for small samples")
    width: PositiveInt = Field(192, description="width of the residual stream")
    depth: PositiveInt = Field(3, description="number of residual blocks")


def build_network(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> "ResidualMLP":
    """A freshly initialised network for samples of ``sample_shape`` and labels 0 .. num_classes - 1."""
    return ResidualMLP(sample_shape, num_classes, config.width, config.depth)


class ResidualMLP(nn.Module):
    """A residual MLP whose blocks are scaled and shifted by time and class (adaLN).

    Attributes:
        null_label: the label that stands for "no class": num_classes.
    """

    def __init__(self, sample_shape: tuple[int, ...], num_classes: int, width: int = 192, depth: int = 3) -> None:
        super().__init__()
        self.sample_shape = tuple(sample_shape)
        self.null_label = num_classes
        size = math.prod(self.sample_shape)
        self.time = nn.Sequential(FourierTime(CONDITION_WIDTH), nn.Linear(CONDITION_WIDTH, CONDITION_WIDTH), nn.SiLU())
        self.label = nn.Embedding(num_classes + 1, CONDITION_WIDTH)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))
        nn.init.normal_(self.label.weight, std=0.5)
        nn.init.zeros_(self.leave[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.leave[1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x [batch, *sample_shape], t scalar or [batch] in [0, 1], label [batch] in 0 .. null_label -> like x."""
        condition = nn.functional.silu(self.time(t.to(x.dtype).reshape(-1)) + self.label(label))
        hidden = self.enter(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        velocity: Tensor = self.leave(hidden).reshape(x.shape)
        return velocity


class FourierTime(nn.Module):
    """Times in [0, 1] to ``width`` sines and cosines with frequencies from 1/4 to 64 turns."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        turns = torch.logspace(-2, 6, width // 2, base=2.0)
        self.register_buffer("frequencies", 2 * math.pi * turns, persistent=False)
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        """[batch] -> [batch, width]."""
        angle = t[:, None] * self.frequencies
        return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, self.width % 2))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(CONDITION_WIDTH, 2 * width)
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition).chunk(2, dim=1)
        out: Tensor = hidden + self.net(self.norm(hidden) * (1 + scale) + shift)
        return out
