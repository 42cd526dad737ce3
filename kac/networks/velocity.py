"""The interface of velocity networks: their null label, their conditions, and how their weights are loaded."""

import math
from collections.abc import Sequence
from typing import Literal, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from kac.util.errors import CheckpointError
from kac.util.options import Kinded

Condition = Literal["end_time", "guidance"]
"""Optional inputs of a network besides time and label: the end time of a step, and the guidance scale."""

Conditioning = Literal["classes_and_null", "classes", "none"]
"""What a network is conditioned on: classes and the null label ("no class"), only classes, or no classes."""


LabelChoice = Literal["with_null", "without_null", "none"]
"""Labels that a module from elsewhere accepts: classes and a null label, only classes, or none."""

CONDITIONING: dict[LabelChoice, Conditioning] = {
    "with_null": "classes_and_null",
    "without_null": "classes",
    "none": "none",
}


class NetworkOptions(Kinded):
    """Options that networks of every kind share."""

    conditions: tuple[Condition, ...] = Field((), description="inputs besides time and label: end_time, guidance")
    bounded: bool = Field(
        False, description="clamp sampled velocities to the speed limit of the Kac path at their time; not in training"
    )

    @property
    def conditioning(self) -> Conditioning:
        """What the network can be conditioned on. ``ModelConfig.conditioning`` records what training used."""
        return "classes_and_null"

    @property
    def has_null_label(self) -> bool:
        """Whether the network accepts the null label ("no class")."""
        return self.conditioning != "classes"

    def for_student(self, conditions: tuple[Condition, ...], bounded: bool) -> Self:
        """Return the config of a student of this network, with these inputs besides time and label."""
        return self.model_copy(update={"conditions": conditions, "bounded": bounded})


class VelocityNetwork(Protocol):
    """A class-conditional velocity field u(x, t, label), with a null label for guidance."""

    null_label: int | None
    takes: tuple[Condition, ...]

    def __call__(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        """Return the velocity [batch, *sample] at x [batch, *sample], t (scalar or [batch]) and label [batch].

        ``conditions`` must be exactly the inputs that ``takes`` names, each a scalar or [batch].
        """
        ...


class NetworkModule(nn.Module):
    """A trainable ``VelocityNetwork``."""

    null_label: int | None  # equal to num_classes; None if the network has no null label
    takes: tuple[Condition, ...]  # the conditions in the network's config
    diffusers_name: str | None = None  # name of the diffusers submodule and of its folder

    def __init__(self) -> None:
        super().__init__()
        self.guide: NetworkModule | None = None  # a weaker network, for autoguidance; see ``kac.guidance``

    def feature_layers(self) -> Sequence[nn.Module]:
        """Return the layers, in order, whose outputs are features of the input: [batch, width], [batch, channels,
        height, width] or tokens [batch, side * side, channels], or a tuple that starts with one of these."""
        return [self]


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights. Embeddings of conditions may be missing, because they have no effect before training.

    Raises:
        CheckpointError: any other tensor is missing, is unexpected, or has a different shape.
    """
    own = network.state_dict()
    missing = [name for name in own if name not in weights and not name.startswith("conditions.")]
    unfit = [name for name, value in weights.items() if name not in own or own[name].shape != value.shape]
    if missing or unfit:
        names = ", ".join((missing + unfit)[:3])
        raise CheckpointError(
            f"The weights do not fit this network. Tensors are missing, unexpected or of a different shape: {names}."
        )
    network.load_state_dict(weights, strict=False)


class FourierFeatures(nn.Module):
    """Encodes scalars as ``width`` sines and cosines, with frequencies from ``cycles[0]`` to ``cycles[1]`` per unit."""

    frequencies: Tensor

    def __init__(self, width: int, cycles: tuple[float, float] = (1 / 4, 64)) -> None:
        super().__init__()
        lowest, highest = (math.log2(each) for each in cycles)
        frequencies = torch.logspace(lowest, highest, width // 2, base=2.0)
        self.register_buffer("frequencies", 2 * math.pi * frequencies, persistent=False)
        self.width = width

    def forward(self, value: Tensor) -> Tensor:
        """Encode the scalars ``value`` [batch] as features [batch, width]."""
        angle = value[:, None] * self.frequencies
        return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, self.width % 2))


# Students are trained on only a few guidance scales. Low frequencies interpolate smoothly between these scales.
CONDITION_CYCLES: dict[Condition, tuple[float, float]] = {"end_time": (1 / 4, 64), "guidance": (1 / 64, 1 / 4)}


class ConditionEmbedding(nn.Module):
    """Adds an embedding of the conditions, which is 0 before training, to the embedding of time and label."""

    def __init__(self, conditions: tuple[Condition, ...], width: int) -> None:
        super().__init__()
        self.names = conditions
        for name in conditions:
            last = nn.Linear(width, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            features = FourierFeatures(width, CONDITION_CYCLES[name])
            self.add_module(name, nn.Sequential(features, nn.Linear(width, width), nn.SiLU(), last))

    def forward(self, embedding: Tensor, given: dict[str, Tensor]) -> Tensor:
        """Return ``embedding`` [batch, width] plus the embeddings of ``given``, each a scalar or [batch]."""
        if sorted(given) != sorted(self.names):
            raise ValueError(f"The network takes the conditions {sorted(self.names)}, but got {sorted(given)}.")
        for name in self.names:
            embedding = embedding + self.get_submodule(name)(given[name].to(embedding.dtype).reshape(-1))
        return embedding
