"""Infer the options of a network from its weights, for error messages about weights that do not fit."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kac.networks.dit import DiTConfig
from kac.networks.mlp import MLPConfig
from kac.networks.network import NetworkConfig
from kac.networks.openai import CLASSES, OUR_CLASSES, has_resblock_updown, is_openai
from kac.networks.unet import UNetConfig

Inferred = dict[str, tuple[Any, Any]]
"""Per option: its value in the weights, and its value in the config."""


def differing_options(
    config: NetworkConfig, weights: Mapping[str, Tensor], sample_shape: tuple[int, ...], expected: Mapping[str, Tensor]
) -> list[str]:
    """Describe the options in which ``weights`` differ from ``config``; empty if no difference can be inferred.

    Args:
        weights: under the names of the network or of OpenAI's U-Net; some may be missing or unexpected.
        expected: the weights of the network of ``config``.
    """
    try:
        inferred = _infer(config, weights, sample_shape, expected)
    except (KeyError, IndexError, ValueError):  # a weight is missing that would show an option
        return []
    return [
        f"{option} {_format(actual)} (given: {_format(given)})"
        for option, (actual, given) in inferred.items()
        if actual != given
    ]


def _infer(
    config: NetworkConfig, weights: Mapping[str, Tensor], sample_shape: tuple[int, ...], expected: Mapping[str, Tensor]
) -> Inferred:
    if isinstance(config, MLPConfig):
        width, size = weights["enter.weight"].shape
        return {
            "`network.width`": (width, config.width),
            "`network.depth`": (_count(r"blocks\.(\d+)\.", weights), config.depth),
            "values per sample (`data`):": (size, expected["enter.weight"].shape[1]),
            **_classes(weights, "label.weight", expected["label.weight"]),
        }
    if isinstance(config, DiTConfig):
        width, channels, patch, _ = weights["pos_embed.proj.weight"].shape
        table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
        return {
            "`network.heads` x `network.head_channels`": (width, config.heads * config.head_channels),
            "`network.depth`": (_count(r"transformer_blocks\.(\d+)\.", weights), config.depth),
            "`network.patch`": (patch, config.patch),
            "`data.channels`": (channels, sample_shape[0]),
            **_classes(weights, table, expected[table]),
        }
    if isinstance(config, UNetConfig):
        return _infer_unet(config, weights, sample_shape, expected)
    return {}


def _infer_unet(
    config: UNetConfig, weights: Mapping[str, Tensor], sample_shape: tuple[int, ...], expected: Mapping[str, Tensor]
) -> Inferred:
    theirs = is_openai(weights)
    blocks = _openai_blocks(weights) if theirs else _diffusers_blocks(weights)  # prefixes, as [level][block]
    convolution, embedding = ("in_layers.2", "emb_layers.1") if theirs else ("conv1", "time_emb_proj")
    channels = tuple(weights[f"{level[0]}.{convolution}.weight"].shape[0] for level in blocks)
    side = sample_shape[1] // config.patch
    attention = tuple(side // 2**i for i, level in enumerate(blocks) if _attention_weight(level[0]) in weights)
    first = weights["input_blocks.0.0.weight" if theirs else "conv_in.weight"]
    scale_shift = weights[f"{blocks[0][0]}.{embedding}.weight"].shape[0] == 2 * channels[0]
    in_channels = "`data.channels`" if config.patch == 1 else "`data.channels` x `network.patch` squared"
    return {
        "`network.channels`": (channels, config.channels),
        "`network.blocks`": (len(blocks[0]), config.blocks),
        "`network.attention`": (attention, tuple(sorted(config.attention, reverse=True))),
        "`network.scale_shift`": (scale_shift, config.scale_shift),
        **_classes(weights, CLASSES if theirs else OUR_CLASSES, expected[OUR_CLASSES]),
        in_channels: (first.shape[1], expected["conv_in.weight"].shape[1]),
    }


def _diffusers_blocks(weights: Mapping[str, Tensor]) -> list[list[str]]:
    levels = range(_count(r"down_blocks\.(\d+)\.", weights))
    return [
        [
            f"down_blocks.{level}.resnets.{block}"
            for block in range(_count(rf"down_blocks\.{level}\.resnets\.(\d+)\.", weights))
        ]
        for level in levels
    ]


def _openai_blocks(weights: Mapping[str, Tensor]) -> list[list[str]]:
    if has_resblock_updown(weights):
        raise ValueError("no option describes resblock_updown")
    blocks: list[list[str]] = [[]]
    for number in range(1, _count(r"input_blocks\.(\d+)\.", weights)):
        if f"input_blocks.{number}.0.op.weight" in weights:
            blocks.append([])
        else:
            blocks[-1].append(f"input_blocks.{number}.0")
    return blocks


def _attention_weight(block: str) -> str:
    """Return the name of a weight that exists if this residual block has attention."""
    if block.startswith("input_blocks"):
        return f"{block.removesuffix('.0')}.1.qkv.weight"
    return f"{block.replace('resnets', 'attentions')}.to_q.weight"


def _classes(weights: Mapping[str, Tensor], name: str, expected: Tensor) -> Inferred:
    """Return the rows of the class embedding. A U-Net may lack the row of the null label."""
    if name not in weights or (name in {CLASSES, OUR_CLASSES} and len(weights[name]) == len(expected) - 1):
        return {}
    return {"labels (the classes of `data`, and 'no class'):": (len(weights[name]), len(expected))}


def _count(pattern: str, weights: Mapping[str, Tensor]) -> int:
    """Return one more than the largest number that the group of ``pattern`` matches in a name."""
    return 1 + max(int(match[1]) for name in weights if (match := re.match(pattern, name)))


def _format(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "without a value"
    return str(value)
