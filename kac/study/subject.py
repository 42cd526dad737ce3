"""The subject of a study: a network, its sampling, and the noise that it starts from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kac.model import ModelConfig
from kac.networks import Condition, VelocityNetwork
from kac.sampling import Sampling, initial_noise


@dataclass(frozen=True)
class Subject:
    """A model that is studied. All subjects of a study start from the same uniform numbers and labels."""

    name: str
    network: VelocityNetwork
    config: ModelConfig
    sampling: Sampling
    device: torch.device
    seed: int
    count: int
    batch_size: int

    def starts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the noise [batch, *sample] and labels [batch] of all samples, on the subject's device."""
        for first in range(0, self.count, self.batch_size):
            ids = range(first, min(first + self.batch_size, self.count))
            x_1, label = initial_noise(self.config, self.seed, ids)
            yield x_1.to(self.device), label.to(self.device)


class Watched:
    """A network that passes each velocity it computes, before guidance, to a callback."""

    def __init__(self, network: VelocityNetwork, see: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        self.network, self.see = network, see
        self.null_label: int | None = network.null_label
        self.takes: tuple[Condition, ...] = getattr(network, "takes", ())

    def __call__(self, x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        """Call the network, then ``see(x, t, u)``; otherwise as ``VelocityNetwork``."""
        u = self.network(x, t, label, **conditions)
        self.see(x, t, u)
        return u
