"""Components of exported pipelines that diffusers does not have. ``bundle`` copies them into their own folders."""

from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from kac.networks.mlp import ResidualMLP
from kac.networks.velocity import ConditionEmbedding


class KacMLP(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The velocity u(x, t, label) of a residual MLP."""

    @register_to_config
    def __init__(
        self, width: int, depth: int, conditions: list[str], sample_shape: list[int], num_classes: int
    ) -> None:
        super().__init__()
        config = SimpleNamespace(width=width, depth=depth, conditions=tuple(conditions))
        self.network = ResidualMLP(config, tuple(sample_shape), num_classes)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        """Return the velocity at x [batch, *sample_shape], t (scalar or [batch]) and label [batch]."""
        return self.network(x, t, label, **conditions)  # type: ignore[no-any-return]


class KacConditions(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The embedding of a step's end time and of the guidance scale, which is added to a model's class embedding."""

    @register_to_config
    def __init__(self, conditions: list[str], width: int) -> None:
        super().__init__()
        self.embedding = ConditionEmbedding(tuple(conditions), width)  # type: ignore[arg-type]

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        """Return the embedding [batch or 1, width] of the conditions, each a scalar or [batch]."""
        zeros = torch.zeros(1, self.config.width, dtype=self.dtype, device=self.device)
        return self.embedding(zeros, given)  # type: ignore[no-any-return]
