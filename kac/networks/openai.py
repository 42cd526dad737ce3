"""Convert weights of OpenAI's U-Net (guided-diffusion, torchcfm, the code of Kac flows) to diffusers' U-Net.

Both compute the same function. The names of the weights differ, and so does attention: OpenAI has one 1-d convolution
that makes queries, keys and values head by head (use_new_attention_order=False, the default); diffusers has three
linear layers.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from kac.networks.unet import UNetConfig
from kac.util.errors import ArgumentError, CheckpointError
from kac.util.text import shorten

GROUPS = 32
"""The number of groups in all its group norms. It cannot be inferred from the weights."""

CLASSES, OUR_CLASSES = "label_emb.weight", "class_embedding.weight"

OUTERMOST = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESIDUAL_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


class Layer(NamedTuple):
    """A layer of OpenAI's U-Net, and its one or three layers in diffusers."""

    theirs: str
    ours: tuple[str, ...]


def is_openai(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights have the names of OpenAI's U-Net."""
    return any(name.startswith("input_blocks.") for name in weights)


def has_resblock_updown(weights: Mapping[str, Tensor]) -> bool:
    """Whether residual blocks change the resolution: only this option puts two of them into one output block."""
    return any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", name) for name in weights)


def openai_names(config: UNetConfig, width: int, expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of the weights of OpenAI's U-Net, each with its one or three names in diffusers."""
    return {
        f"{layer.theirs}.{kind}": [f"{name}.{kind}" for name in layer.ours]
        for layer in _layers(config, width)
        for kind in ("weight", "bias")
        if f"{layer.ours[0]}.{kind}" in expected  # a block without a change of channels has no skip_connection
    }


def from_openai(
    weights: Mapping[str, Tensor], config: UNetConfig, width: int, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights under the names of diffusers, with the class embedding if there is one.

    Args:
        width: of the images, in pixels.
        expected: the weights of diffusers' U-Net of this config.

    Raises:
        ArgumentError: the config has options that OpenAI's U-Net lacks.
        CheckpointError: weights are missing, unexpected or of another shape; the message names the first three.
    """
    _check_options(config)
    if has_resblock_updown(weights):
        raise CheckpointError(
            "this U-Net was built with resblock_updown=True, which diffusers does not have. Use `network` outside with "
            "the code that it was trained with."
        )
    wanted = openai_names(config, width, expected)
    translated = {OUR_CLASSES: weights[CLASSES]} if CLASSES in weights else {}
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [f"{name} is unexpected" for name in weights if name not in wanted and name != CLASSES]
    for theirs in (name for name in wanted if name in weights):
        ours, value = wanted[theirs], _as_matrix(weights[theirs], expected[wanted[theirs][0]].ndim)
        rows, *others = expected[ours[0]].shape
        if list(value.shape) == [len(ours) * rows, *others]:
            parts = [value] if len(ours) == 1 else _queries_keys_values(value, config.head_channels or rows)
            translated.update(zip(ours, parts, strict=True))
        else:
            problems.append(f"{theirs} has shape {list(value.shape)} instead of {[len(ours) * rows, *others]}")
    if problems:
        raise CheckpointError(shorten(problems, 3))
    return translated


def _check_options(config: UNetConfig) -> None:
    fixed = {
        "time_scale": (config.time_scale, 1, "embeds unscaled times"),
        "patch": (config.patch, 1, "does not fold images into patches"),
        "groups": (config.groups, GROUPS, f"has {GROUPS} groups in every group norm"),
    }
    for option, (value, expected, reason) in fixed.items():
        if value != expected:
            raise ArgumentError(
                f"`network.{option}` is {value:g}, but a U-Net of OpenAI {reason}. Set it to {expected}."
            )


def _layers(config: UNetConfig, width: int) -> Iterator[Layer]:
    """Yield every layer. OpenAI's U-Net numbers its blocks across levels, including the changes of resolution."""
    last = len(config.channels) - 1
    has_attention = [width // 2**level in config.attention for level in range(last + 1)]
    yield from _renamed("", "", OUTERMOST)
    number = 1
    for level in range(last + 1):
        for block in range(config.blocks):
            yield from _block(f"input_blocks.{number}", f"down_blocks.{level}", block, has_attention[level])
            number += 1
        if level < last:
            yield Layer(f"input_blocks.{number}.0.op", (f"down_blocks.{level}.downsamplers.0.conv",))
            number += 1
    yield from _renamed("middle_block.0", "mid_block.resnets.0", RESIDUAL_BLOCK)
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _renamed("middle_block.2", "mid_block.resnets.1", RESIDUAL_BLOCK)
    for level in range(last + 1):  # from the last level up
        attends = has_attention[last - level]
        first = level * (config.blocks + 1)
        for block in range(config.blocks + 1):
            yield from _block(f"output_blocks.{first + block}", f"up_blocks.{level}", block, attends)
        if level < last:
            upsampler = f"output_blocks.{first + config.blocks}.{1 + attends}.conv"
            yield Layer(upsampler, (f"up_blocks.{level}.upsamplers.0.conv",))


def _block(theirs: str, ours: str, block: int, attends: bool) -> Iterator[Layer]:
    yield from _renamed(f"{theirs}.0", f"{ours}.resnets.{block}", RESIDUAL_BLOCK)
    if attends:
        yield from _attention(f"{theirs}.1", f"{ours}.attentions.{block}")


def _attention(theirs: str, ours: str) -> Iterator[Layer]:
    yield from _renamed(theirs, ours, {"norm": "group_norm", "proj_out": "to_out.0"})
    yield Layer(f"{theirs}.qkv", tuple(f"{ours}.{name}" for name in ("to_q", "to_k", "to_v")))


def _renamed(theirs: str, ours: str, names: Mapping[str, str]) -> Iterator[Layer]:
    for name, our_name in names.items():
        yield Layer(f"{theirs}.{name}".lstrip("."), (f"{ours}.{our_name}".lstrip("."),))


def _as_matrix(value: Tensor, ndim: int) -> Tensor:
    """Return a 1x1 convolution, [out, in, 1, ...], as a matrix if ``ndim`` is 2."""
    return value.flatten(1) if ndim == 2 and value.shape[2:].numel() == 1 else value


def _queries_keys_values(value: Tensor, head_channels: int) -> list[Tensor]:
    """Split [3 channels, ...], ordered by head, then query/key/value, then channel, into three [channels, ...]."""
    by_head = value.reshape(-1, 3, head_channels, *value.shape[1:])
    return [part.flatten(0, 1) for part in by_head.unbind(1)]
