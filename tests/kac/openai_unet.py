"""A small, slow reimplementation of OpenAI's U-Net, used to test converted weights.

Its weights have the same names as in guided-diffusion and torchcfm.
"""

import math

import torch
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def embedding(t: Tensor, width: int) -> Tensor:
    """Return cosines, then sines, of frequencies from 1 down to 1/10000: [batch] -> [batch, width]."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, width: int, scale_shift: bool) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(norm(out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden, embedded = self.in_layers(x), self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            hidden = self.out_layers[1:](self.out_layers[0](hidden) * (1 + scale) + shift)
        else:
            hidden = self.out_layers(hidden + embedded)
        return self.skip_connection(x) + hidden


class AttentionBlock(nn.Module):
    """Attention between all pixels. The queries, keys and values of one head are adjacent channels."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm, self.qkv = norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        flat = x.flatten(2)
        by_head = self.qkv(self.norm(flat)).reshape(len(x) * self.heads, -1, flat.shape[2])
        q, k, v = by_head.chunk(3, dim=1)
        weight = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(q.shape[1])).softmax(dim=2)
        hidden = torch.einsum("bts,bcs->bct", weight, v).reshape(flat.shape)
        return (flat + self.proj_out(hidden)).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


class Plain(nn.Conv2d):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().forward(x)


class OpenAIUNet(nn.Module):
    """x [batch, channels, width, width], t [batch], y [batch] -> like x.

    Args:
        attention: widths of the levels with attention, in pixels.
        classes: rows of the class embedding; None: no classes.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        blocks: int,
        attention: tuple[int, ...],
        head_channels: int | None,
        scale_shift: bool,
        sample_shape: tuple[int, int, int],
        classes: int | None = None,
    ) -> None:
        super().__init__()
        first, width, size = channels[0], 4 * channels[0], sample_shape[1]
        self.first = first
        self.time_embed = nn.Sequential(nn.Linear(first, width), nn.SiLU(), nn.Linear(width, width))
        self.label_emb = nn.Embedding(classes, width) if classes else None

        def block(incoming: int, out: int) -> list[nn.Module]:
            attends = [AttentionBlock(out, head_channels or out)] if size in attention else []
            return [ResBlock(incoming, out, width, scale_shift), *attends]

        self.input_blocks = nn.ModuleList([nn.ModuleList([Plain(sample_shape[0], first, 3, padding=1)])])
        skips, here = [first], first
        for level, out in enumerate(channels):
            for _ in range(blocks):
                self.input_blocks.append(nn.ModuleList(block(here, out)))
                here = out
                skips.append(here)
            if level < len(channels) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(here)]))
                skips.append(here)
                size //= 2
        self.middle_block = nn.ModuleList(
            [
                ResBlock(here, here, width, scale_shift),
                AttentionBlock(here, head_channels or here),
                ResBlock(here, here, width, scale_shift),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(channels))):
            for number in range(blocks + 1):
                parts = block(here + skips.pop(), out)
                here = out
                if level and number == blocks:
                    parts.append(Upsample(here))
                    size *= 2
                self.output_blocks.append(nn.ModuleList(parts))
        self.out = nn.Sequential(norm(first), nn.SiLU(), nn.Conv2d(first, sample_shape[0], 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(embedding(t, self.first))
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for parts in self.input_blocks:
            for part in parts:
                x = part(x, emb)
            skips.append(x)
        for part in self.middle_block:
            x = part(x, emb)
        for parts in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for part in parts:
                x = part(x, emb)
        return self.out(x)


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Return the network in evaluation mode, with random weights so that every part has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        spread = 1 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.3
        noise = torch.randn(parameter.shape, generator=generator) * spread
        parameter.data.copy_(noise if parameter.ndim > 1 else parameter.data + noise)
    return network.eval().requires_grad_(False)
