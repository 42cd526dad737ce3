"""What is trained: networks, each with its optimizer and its average; the batches and random numbers of an update."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kac.networks import NetworkModule, VelocityNetwork
from kac.precision import Precision
from pipeline.config import OptimizerConfig

Tensors = tuple[Tensor, ...] | list[Tensor]

Losses = Callable[[VelocityNetwork, int], dict[str, Tensor]]
"""(network, update) -> the parts of this worker's loss of the update by name, scalars."""

AVERAGE = "average"
"""Where a learner's state has the weights that become the model."""


class Worker(NamedTuple):
    """Where a copy of the loop runs."""

    rank: int
    world_size: int
    device: torch.device


class Learner(Protocol):
    """What the loop trains: one network, or several with an optimizer each."""

    def update(self, number: int) -> dict[str, Tensor]:
        """Do update ``number``; returns the parts of the loss by name, scalars: what is minimised is their sum."""
        ...

    def learning_rate(self) -> float:
        """The learning rate of the last update."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that goes on with the next update; under ``AVERAGE`` the weights that become the model."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        ...


class TrainedNetwork:
    """A network in training on one worker: data-parallel, with AdamW and an exponential moving average.

    Attributes:
        forward: the network as the loss calls it: in its precision, its gradients averaged over the workers.
    """

    def __init__(
        self, network: NetworkModule, options: OptimizerConfig, worker: Worker, precision: Precision | None = None
    ) -> None:
        self.options = options
        self.network = network.to(worker.device).train()
        self.average = AveragedModel(network, multi_avg_fn=_warmed_average(options.ema_decay))
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=options.learning_rate,
            betas=(0.9, options.beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.forward: VelocityNetwork = (precision or Precision()).wrap(_data_parallel(network, worker))

    def descend(self, loss: Tensor, update: int) -> None:
        """One optimizer step down the gradient of ``loss``, at the learning rate of ``update``."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * learning_rate_factor(update, self.options)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), self.options.max_gradient_norm)
        self.optimizer.step()
        self.average.update_parameters(self.network)

    def learning_rate(self) -> float:
        """The learning rate of the last update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """The weights, their average and the optimizer's state."""
        return {
            "network": self.network.state_dict(),
            AVERAGE: self.average.module.state_dict(),
            "averaged_updates": int(self.average.n_averaged),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.network.load_state_dict(state["network"])
        self.average.module.load_state_dict(state[AVERAGE])
        self.average.n_averaged.fill_(state["averaged_updates"])
        self.optimizer.load_state_dict(state["optimizer"])


class NetworkLearner(TrainedNetwork):
    """A learner of one network."""

    def __init__(
        self,
        network: NetworkModule,
        losses: Losses,
        options: OptimizerConfig,
        worker: Worker,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(network, options, worker, precision)
        self.losses = losses

    def update(self, number: int) -> dict[str, Tensor]:
        """Do update ``number``; returns the parts of the loss by name."""
        parts = self.losses(self.forward, number)
        self.descend(torch.stack(list(parts.values())).sum(), number)
        return {name: part.detach() for name, part in parts.items()}


# Random numbers: functions of (seed, update, rank) alone, so that no random state needs to be saved.


def seeded(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on the whole ``key``."""
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def generator(seed: int, update: int, worker: Worker) -> torch.Generator:
    """The random numbers of one worker's update, on its device."""
    on_cpu = seeded(seed, update, worker.rank)
    if worker.device.type == "cpu":
        return on_cpu
    return torch.Generator(worker.device).manual_seed(on_cpu.initial_seed())


class EpochOrder:
    """Endless shuffled epochs over ``count`` rows, cut into batches; an epoch is shuffled once, when it begins."""

    def __init__(self, seed: int, count: int, batch_size: int) -> None:
        self.seed, self.count, self.batch_size = seed, count, batch_size
        self._shuffled: dict[int, Tensor] = {}

    def batch(self, update: int) -> Tensor:
        """The rows of an update's batch: [batch_size], int64."""
        first, last = update * self.batch_size, (update + 1) * self.batch_size
        epochs = range(first // self.count, (last - 1) // self.count + 1)
        known = self._shuffled
        self._shuffled = {epoch: known[epoch] if epoch in known else self._shuffle(epoch) for epoch in epochs}
        order = torch.cat(list(self._shuffled.values())) if len(epochs) > 1 else self._shuffled[epochs.start]
        return order[first - epochs.start * self.count :][: self.batch_size]

    def _shuffle(self, epoch: int) -> Tensor:
        return torch.randperm(self.count, generator=seeded(self.seed, epoch))


def learning_rate_factor(update: int, options: OptimizerConfig) -> float:
    """Linear warm-up, then half a cosine down to 0 at the last update."""
    if update < options.warmup_updates:
        return (update + 1) / options.warmup_updates
    share = (update - options.warmup_updates) / max(1, options.updates - options.warmup_updates)
    return 0.5 * (1 + math.cos(math.pi * share))


def _warmed_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """An exponential moving average whose decay grows with its age, so that the first weights are soon forgotten."""

    @torch.no_grad()
    def average(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        d = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, 1 - d)

    return average


def _data_parallel(network: nn.Module, worker: Worker) -> nn.Module:
    if worker.world_size == 1 or not dist.is_initialized():
        return network
    device_ids = [worker.device.index] if worker.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=device_ids)
