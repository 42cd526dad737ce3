"""diffusers' class-conditional diffusion transformer (DiT, arXiv 2212.09748) for images."""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import nn

from kac.networks.diffusers import ConditionedLabels, DiffusersNetwork, InputConv2d, folded_shape
from kac.networks.velocity import ConditionEmbedding, NetworkOptions


class DiTConfig(NetworkOptions):
    """Options of diffusers' DiTTransformer2DModel, which is class-conditional."""

    kind: Literal["dit"] = Field("dit", description="dit: diffusers' DiTTransformer2DModel, for images")
    heads: PositiveInt = Field(6, description="attention heads")
    head_channels: PositiveInt = Field(64, description="channels per attention head")
    depth: PositiveInt = Field(12, description="transformer blocks")
    patch: PositiveInt = Field(2, description="width and height of each token's image patch, in pixels")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability in the blocks")
    time_scale: PositiveFloat = Field(1000.0, description="factor that multiplies t before it is embedded")

    @model_validator(mode="after")
    def _positions_fit(self) -> Self:
        if self.heads * self.head_channels % 4:  # a position embedding has a sine and a cosine per coordinate
            product = f"{self.heads} x {self.head_channels} = {self.heads * self.head_channels}"
            raise ValueError(f"`head_channels`: heads x head channels is {product}, but must be a multiple of 4.")
        return self


class DiT(DiffusersNetwork):
    """diffusers' DiTTransformer2DModel as a velocity network."""

    diffusers_name = "transformer"

    def __init__(self, config: DiTConfig, sample_shape: tuple[int, ...], num_classes: int) -> None:
        from diffusers import DiTTransformer2DModel

        super().__init__(config, num_classes, config.heads * config.head_channels)
        folded_shape(config.patch, sample_shape)
        self.transformer: Any = DiTTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_channels,
            in_channels=sample_shape[0],
            num_layers=config.depth,
            dropout=config.dropout,
            sample_size=sample_shape[1],
            patch_size=config.patch,
            num_embeds_ada_norm=num_classes,
        )
        self.transformer.pos_embed.proj.__class__ = InputConv2d
        self.conditions = ConditionEmbedding(config.conditions, self.width)
        for block in self.transformer.transformer_blocks:
            labels = block.norm1.emb.class_embedder
            labels.dropout_prob = 0.0  # the teacher's loss drops labels instead, for every kind of network
            labels.embedding_table = ConditionedLabels(num_classes + 1, self.width)
            nn.init.normal_(labels.embedding_table.weight, std=0.02)
        # As in adaLN-Zero, blocks start as the identity and the velocity starts at 0. diffusers does not do this.
        gates = [block.norm1.linear for block in self.transformer.transformer_blocks]
        for layer in (*gates, self.transformer.proj_out_1, self.transformer.proj_out_2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def feature_layers(self) -> Sequence[nn.Module]:
        """Return the transformer blocks."""
        return list(self.transformer.transformer_blocks)
