"""What every velocity network has: a null label, declared conditions, and weights that can be taken over."""

import math
from typing import ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from kac.util.errors import CheckpointError
from kac.util.options import Kinded

Condition = Literal["end_time", "guidance"]
"""Inputs that a network may have beside time and label: the end time of a step, and the guidance scale."""

Conditioning = Literal["classes_and_null", "classes", "none"]
"""What a network is conditioned on: classes and the null label ("no class"), classes only, or no classes at all."""

CONDITION_MODULE = "conditions"
"""The submodule of every network that embeds them; weights from a network without a condition lack that part."""


class NetworkOptions(Kinded):
    """What the config of every kind of network has."""

    builds_on_meta: ClassVar[bool] = True
    """Whether the network can be built on PyTorch's meta device, where weights have shapes and no numbers."""

    conditions: tuple[Condition, ...] = Field((), description="inputs beside time and label: end_time, guidance")

    @property
    def conditioning(self) -> Conditioning:
        """What the network can be conditioned on; how it is trained may leave less."""
        return "classes_and_null"

    @property
    def has_null_label(self) -> bool:
        """Whether the network accepts the label "no class"."""
        return self.conditioning != "classes"


class VelocityNetwork(Protocol):
    """A class-conditional velocity field u(x, t, label) with a null label for guidance."""

    null_label: int | None
    takes: tuple[Condition, ...]

    def __call__(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        """x [batch, *sample], t scalar or [batch], label [batch] -> velocity [batch, *sample].

        ``conditions``: those that the network ``takes``, each a scalar or [batch].
        """
        ...


class NetworkModule(nn.Module):
    """A velocity network that is trained here; its forward is that of ``VelocityNetwork``."""

    null_label: int | None  # stands for "no class": num_classes; None: the network knows classes alone
    takes: tuple[Condition, ...]  # as its config declares
    diffusers_name: str | None = None  # its submodule that is a model of diffusers, and that model's folder


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load the weights of a network of the same shape, which may have fewer conditions: new ones start without effect.

    Raises:
        CheckpointError: the weights do not fit otherwise.
    """
    own = network.state_dict()
    missing = [name for name in own if name not in weights and not name.startswith(f"{CONDITION_MODULE}.")]
    unfit = [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]
    if missing or unfit:
        names = ", ".join((missing + unfit)[:3])
        raise CheckpointError(f"expected the weights of this network, found {names} missing or of another shape")
    network.load_state_dict(weights, strict=False)


class FourierFeatures(nn.Module):
    """Scalars to ``width`` sines and cosines.

    Args:
        turns: lowest and highest frequency, in turns for each 1.
    """

    frequencies: Tensor

    def __init__(self, width: int, turns: tuple[float, float] = (1 / 4, 64)) -> None:
        super().__init__()
        lowest, highest = (math.log2(each) for each in turns)
        frequencies = torch.logspace(lowest, highest, width // 2, base=2.0)
        self.register_buffer("frequencies", 2 * math.pi * frequencies, persistent=False)
        self.width = width

    def forward(self, value: Tensor) -> Tensor:
        """[batch] -> [batch, width]."""
        angle = value[:, None] * self.frequencies
        return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, self.width % 2))


TURNS: dict[Condition, tuple[float, float]] = {"end_time": (1 / 4, 64), "guidance": (1 / 64, 1 / 4)}
"""Frequencies of the conditions. A guidance scale is learned at a few values alone: slow waves join those between."""


class ConditionEmbedding(nn.Module):
    """The declared conditions as one vector to be added to the embedding of time and label; 0 before training."""

    def __init__(self, conditions: tuple[Condition, ...], width: int) -> None:
        super().__init__()
        self.names = conditions
        for name in conditions:
            last = nn.Linear(width, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.add_module(
                name, nn.Sequential(FourierFeatures(width, TURNS[name]), nn.Linear(width, width), nn.SiLU(), last)
            )

    def forward(self, embedding: Tensor, given: dict[str, Tensor]) -> Tensor:
        """``embedding`` [batch, width] with the conditions added, each a scalar or [batch].

        Raises:
            ValueError: other conditions than those declared.
        """
        if sorted(given) != sorted(self.names):
            raise ValueError(f"expected the conditions {sorted(self.names)} of the config, got {sorted(given)}")
        for name in self.names:
            embedding = embedding + self.get_submodule(name)(given[name].to(embedding.dtype).reshape(-1))
        return embedding
