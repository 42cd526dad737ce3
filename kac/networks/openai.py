"""Convert weights of OpenAI's U-Net (guided-diffusion, torchcfm, the code of Kac flows) to diffusers' U-Net.

Both U-Nets compute the same function, but name their weights differently. In attention, OpenAI's U-Net computes the
queries, keys and values of one head after another in a single 1-d convolution (use_new_attention_order=False, the
default), whereas diffusers has three linear layers.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from kac.networks.unet import UNetConfig
from kac.util.errors import ArgumentError, CheckpointError

GROUPS = 32  # in every group norm of OpenAI's U-Net; the weights do not reveal this number

OUTERMOST = {
    "label_emb": "class_embedding",
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
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}

OPENAI_NAMES = {f"{layer}.{kind}" for layer in OUTERMOST for kind in ("weight", "bias")}
"""Names of weights that every OpenAI U-Net has."""


def is_openai(weights: Mapping[str, Tensor]) -> bool:
    """Return whether weights are named as in OpenAI's U-Net."""
    return any(name.startswith("input_blocks.") for name in weights)


def from_openai(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Return the weights, under diffusers' names. Weights that OpenAI's U-Net does not have keep their names.

    Raises ``ArgumentError`` or ``CheckpointError`` if one of the two U-Nets uses an option that the other lacks.
    """
    fixed = {
        "time_scale": (config.time_scale, 1, "embeds unscaled times"),
        "patch": (config.patch, 1, "does not fold images into patches"),
        "groups": (config.groups, GROUPS, f"has {GROUPS} groups in every group norm"),
    }
    for option, (value, expected, reason) in fixed.items():
        if value != expected:
            raise ArgumentError(f"`network.{option}` is {value:g}, but OpenAI's U-Net {reason}. Set it to {expected}.")
    # Only resblock_updown puts two residual blocks into one output block.
    if any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", name) for name in weights):
        raise CheckpointError(
            "this U-Net was built with resblock_updown=True, which diffusers does not support. Set `network` to "
            "outside, and `network.module` to the code that built this U-Net."
        )
    layers = _layers(weights)
    translated: dict[str, Tensor] = {}
    for name, given in weights.items():
        layer, _, kind = name.rpartition(".")
        block, _, last = layer.rpartition(".")
        is_convolution = last in {"qkv", "proj_out"} and kind == "weight" and given.shape[2:].numel() == 1
        tensor = given.flatten(1) if is_convolution else given
        if last == "qkv" and block in layers and len(tensor) % 3 == 0:
            parts = _split(tensor, config.head_channels)
            translated |= {f"{layers[block]}.to_{part}.{kind}": each for part, each in zip("qkv", parts, strict=True)}
        else:
            translated[f"{layers[layer]}.{kind}" if layer in layers else name] = tensor
    return translated


def _layers(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the names of layers and attention blocks in OpenAI's U-Net to their names in diffusers.

    OpenAI's U-Net numbers its blocks consecutively across levels, and counts downsampling layers as blocks.
    """
    layers = dict(OUTERMOST)

    def add(theirs: str, ours: str, names: Mapping[str, str]) -> None:
        layers[theirs] = ours
        layers.update({f"{theirs}.{name}": f"{ours}.{our_name}" for name, our_name in names.items()})

    add("middle_block.0", "mid_block.resnets.0", RESIDUAL_BLOCK)
    add("middle_block.1", "mid_block.attentions.0", ATTENTION)
    add("middle_block.2", "mid_block.resnets.1", RESIDUAL_BLOCK)
    for part, ours, resize in (
        ("input_blocks", "down_blocks", "downsamplers.0.conv"),
        ("output_blocks", "up_blocks", "upsamplers.0.conv"),
    ):
        level = block = 0
        words = {name.split(".")[1] for name in weights if name.startswith(f"{part}.")}
        numbers = {int(word) for word in words if word.isdecimal()}
        for number in sorted(numbers - {0} if part == "input_blocks" else numbers):
            theirs = f"{part}.{number}"
            add(f"{theirs}.0", f"{ours}.{level}.resnets.{block}", RESIDUAL_BLOCK)
            add(f"{theirs}.1", f"{ours}.{level}.attentions.{block}", ATTENTION)
            block += 1
            for last in ("0.op", "1.conv", "2.conv"):
                if f"{theirs}.{last}.weight" in weights:
                    layers[f"{theirs}.{last}"] = f"{ours}.{level}.{resize}"
                    level, block = level + 1, 0
    return layers


def _split(value: Tensor, head_channels: int | None) -> list[Tensor]:
    """Split [3 channels, ...], ordered by head, query/key/value and channel, into three tensors [channels, ...]."""
    channels = len(value) // 3
    if not head_channels or channels % head_channels:  # if shapes do not fit, loading fails later
        head_channels = channels
    by_head = value.reshape(-1, 3, head_channels, *value.shape[1:])
    return [part.flatten(0, 1) for part in by_head.unbind(1)]
