"""Who is studied: a network, how it is sampled, and the noise that it starts from."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kac.model import ModelConfig
from kac.networks import Condition, VelocityNetwork
from kac.sampling import Sampling, initial_noise


@dataclass(frozen=True)
class Subject:
    """A model under study. All subjects of a study start from the same uniforms and labels."""

    name: str
    network: VelocityNetwork
    config: ModelConfig
    sampling: Sampling
    device: torch.device
    seed: int
    count: int
    batch_size: int

    def sampled(self, sampling: Sampling) -> "Subject":
        """The same model, sampled in another way."""
        return dataclasses.replace(self, sampling=sampling)

    def starts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Noise [batch, *sample] and labels [batch] of all samples, on the subject's device."""
        for first in range(0, self.count, self.batch_size):
            ids = range(first, min(first + self.batch_size, self.count))
            x_1, label = initial_noise(self.config, self.seed, ids)
            yield x_1.to(self.device), label.to(self.device)


class Watched:
    """A network that shows each velocity it computes, before any guidance."""

    def __init__(self, network: VelocityNetwork, see: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        self.network, self.see = network, see
        self.null_label: int | None = network.null_label
        self.takes: tuple[Condition, ...] = getattr(network, "takes", ())

    def __call__(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        """As ``VelocityNetwork``; calls ``see(x, t, u)``."""
        u = self.network(x, t, label, **conditions)
        self.see(x, t, u)
        return u
