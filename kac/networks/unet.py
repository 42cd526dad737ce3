"""diffusers' U-Net. If ``patch`` is above 1, the U-Net works on smaller images and is several times faster."""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from kac.networks.diffusers import ConditionedLabels, DiffusersNetwork, InputConv2d, folded_shape
from kac.networks.velocity import ConditionEmbedding, NetworkOptions
from kac.util.errors import ArgumentError


class UNetConfig(NetworkOptions):
    """Options of diffusers' UNet2DModel, which this project uses with class labels."""

    kind: Literal["unet"] = Field("unet", description="unet: diffusers' UNet2DModel, for images")
    channels: tuple[PositiveInt, ...] = Field((64, 128), description="channels per level", min_length=1)
    blocks: PositiveInt = Field(2, description="residual blocks per level")
    attention: tuple[PositiveInt, ...] = Field((), description="widths of the levels with attention, in pixels")
    head_channels: PositiveInt | None = Field(None, description="channels per attention head; default: one head")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability in the residual blocks")
    scale_shift: bool = Field(
        False, description="scale and shift the normalised features by time and class instead of adding an embedding"
    )
    patch: PositiveInt = Field(1, description="fold patches of PATCH x PATCH pixels into channels (space to depth)")
    groups: PositiveInt = Field(32, description="groups in each group norm; must divide each level's channel count")
    time_scale: PositiveFloat = Field(1000.0, description="factor that multiplies t before it is embedded")

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> Self:
        if any(width % self.groups for width in self.channels):
            raise ValueError(
                f"`groups` {self.groups} does not divide all of {list(self.channels)}. Choose a common divisor."
            )
        return self


class UNet(DiffusersNetwork):
    """diffusers' UNet2DModel as a velocity network."""

    diffusers_name = "unet"

    def __init__(self, config: UNetConfig, sample_shape: tuple[int, ...], num_classes: int) -> None:
        from diffusers import UNet2DModel

        super().__init__(config, num_classes, 4 * config.channels[0])
        self.patch = config.patch
        self.unet: Any = UNet2DModel(**_arguments(config, sample_shape, num_classes))
        self.unet.conv_in.__class__ = InputConv2d
        self.unet.class_embedding = ConditionedLabels(num_classes + 1, self.width)
        self.conditions = ConditionEmbedding(config.conditions, self.width)
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def feature_layers(self) -> Sequence[nn.Module]:
        """Return the blocks, which are the levels on the way down, the middle, and the levels on the way up."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    def forward(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        """Call ``DiffusersNetwork.forward`` with patches folded into channels, and unfold the velocity."""
        velocity = super().forward(nn.functional.pixel_unshuffle(x, self.patch), t, label, **conditions)
        return nn.functional.pixel_shuffle(velocity, self.patch)


def _arguments(config: UNetConfig, sample_shape: tuple[int, ...], num_classes: int) -> dict[str, Any]:
    channels, size = folded_shape(config.patch, sample_shape)
    widths = [size // 2**level for level in range(len(config.channels))]
    if size % 2 ** (len(config.channels) - 1):
        most = 1 + (size & -size).bit_length() - 1
        raise ArgumentError(
            f"`network.channels` has {len(config.channels)} levels, but images {size} pixels wide allow at most "
            f"{most} levels, because each level after the first halves the width. Give fewer channel counts."
        )
    if unknown := [width for width in config.attention if width not in widths]:
        raise ArgumentError(
            f"`network.attention` contains {unknown}, but the levels are {widths} pixels wide. Choose from these."
        )
    has_attention = [width in config.attention for width in widths]
    attending = zip(config.channels, [*has_attention[:-1], True], strict=True)
    with_heads = {width for width, here in attending if here}
    if any(width % (config.head_channels or width) for width in with_heads):
        raise ArgumentError(
            f"`network.head_channels` {config.head_channels} does not divide all of {sorted(with_heads)}, the channel "
            "counts of the levels with attention (the last level always has attention). Choose a common divisor."
        )
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": config.channels,
        "layers_per_block": config.blocks,
        "down_block_types": tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in has_attention),
        "up_block_types": tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(has_attention)),
        "attention_head_dim": config.head_channels,
        "dropout": config.dropout,
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": config.groups,  # otherwise scale_shift would remove the middle block's norm
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "num_class_embeds": num_classes + 1,
    }
