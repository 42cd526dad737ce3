"""The U-Net of OpenAI (guided-diffusion; torchcfm and the code of Kac flows have it too) as the one of diffusers.

Both are the same function. The weights differ in their names, and in attention: there one 1-d convolution makes
queries, keys and values, head after head (use_new_attention_order=False, the default), here three linear layers do.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from kac.networks.unet import UNetConfig
from kac.util.errors import ArgumentError, CheckpointError

GROUPS = 32
"""Groups of all its norms, which its weights do not show."""

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
    """A layer there, and the one or three that are it here."""

    theirs: str
    ours: tuple[str, ...]


def is_openai(weights: Mapping[str, Tensor]) -> bool:
    """Whether weights have the names of such a U-Net."""
    return any(name.startswith("input_blocks.") for name in weights)


def openai_names(config: UNetConfig, width: int, expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of such a U-Net's weights, each with the one or three names that diffusers has for it."""
    return {
        f"{layer.theirs}.{kind}": [f"{name}.{kind}" for name in layer.ours]
        for layer in _layers(config, width)
        for kind in ("weight", "bias")
        if f"{layer.ours[0]}.{kind}" in expected  # blocks that keep their channels have no skip_connection
    }


def from_openai(
    weights: Mapping[str, Tensor], config: UNetConfig, width: int, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights under the names of diffusers; the embedding of classes, if there is one, as it is.

    Args:
        width: of the images, in pixels.
        expected: names and shapes of the weights of diffusers' U-Net of this config.

    Raises:
        ArgumentError: options that no such U-Net has.
        CheckpointError: weights are missing, left over or of another shape; the first three are named.
    """
    _check_options(config)
    _refuse_resblock_updown(weights)
    wanted = openai_names(config, width, expected)
    translated = {OUR_CLASSES: weights[CLASSES]} if CLASSES in weights else {}
    problems = [f"{name} missing" for name in wanted if name not in weights]
    problems += [f"{name} left over" for name in weights if name not in wanted and name != CLASSES]
    for theirs in (name for name in wanted if name in weights):
        ours, value = wanted[theirs], _without_ones(weights[theirs], expected[wanted[theirs][0]].ndim)
        rows, *others = expected[ours[0]].shape
        if list(value.shape) == [len(ours) * rows, *others]:
            parts = [value] if len(ours) == 1 else _queries_keys_values(value, config.head_channels or rows)
            translated.update(zip(ours, parts, strict=True))
        else:
            problems.append(f"{theirs} of shape {list(value.shape)}, not {[len(ours) * rows, *others]}")
    if problems:
        raise CheckpointError(f"{', '.join(problems[:3])} ({len(problems)} in all)")
    return translated


def _check_options(config: UNetConfig) -> None:
    fixed = {
        "time_scale": (config.time_scale, 1, "it embeds t as it is given"),
        "patch": (config.patch, 1, "it takes images as they are"),
        "groups": (config.groups, GROUPS, "all its norms have so many"),
    }
    for option, (found, expected, why) in fixed.items():
        if found != expected:
            raise ArgumentError(
                f"`network.{option}`: expected {expected} for a U-Net of OpenAI, since {why}, found {found:g}"
            )


def has_resblock_updown(weights: Mapping[str, Tensor]) -> bool:
    """Whether images are halved and doubled by residual blocks: no other option puts two into one output block."""
    return any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", name) for name in weights)


def _refuse_resblock_updown(weights: Mapping[str, Tensor]) -> None:
    if has_resblock_updown(weights):
        raise CheckpointError(
            "expected a U-Net that halves and doubles images by convolutions, found one of resblock_updown=True, which "
            "diffusers does not have: use `network` outside with the code that it was trained with"
        )


def _layers(config: UNetConfig, width: int) -> Iterator[Layer]:
    """Every layer; OpenAI's U-Net numbers its blocks through all levels, with the changes of resolution among them."""
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
    for level in range(last + 1):  # from the last one up
        attends = has_attention[last - level]
        for block in range(config.blocks + 1):
            yield from _block(
                f"output_blocks.{level * (config.blocks + 1) + block}", f"up_blocks.{level}", block, attends
            )
        if level < last:
            block = level * (config.blocks + 1) + config.blocks
            yield Layer(f"output_blocks.{block}.{1 + attends}.conv", (f"up_blocks.{level}.upsamplers.0.conv",))


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


def _without_ones(value: Tensor, ndim: int) -> Tensor:
    """A convolution over single places, [out, in, 1], as the matrix that it is."""
    return value.flatten(1) if ndim == 2 and value.shape[2:].numel() == 1 else value


def _queries_keys_values(value: Tensor, head_channels: int) -> list[Tensor]:
    """[3 channels, ...], laid out as (head, query or key or value, channel), to three of [channels, ...]."""
    by_head = value.reshape(-1, 3, head_channels, *value.shape[1:])
    return [part.flatten(0, 1) for part in by_head.unbind(1)]
