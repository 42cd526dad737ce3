"""What is trained: networks, each with its optimizer and its average; the batches and random numbers of an update."""

import contextlib
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
from pipeline.config.specs import OptimizerConfig

Tensors = tuple[Tensor, ...] | list[Tensor]

AVERAGE = "average"
"""Where a learner's state has the weights that become the model."""


class Worker(NamedTuple):
    """Where a copy of the loop runs."""

    rank: int
    world_size: int
    device: torch.device
    most: int | None = None  # workers that the group may have, if their number may change

    @property
    def seats(self) -> int:
        """How many workers an update's batch is cut for; fewer do the work of several each."""
        return self.most or self.world_size


class MicroBatch(NamedTuple):
    """A part of an update's batch: what a worker takes in one pass.

    What is random about it depends on its slot, whichever worker has it: one worker with two micro-batches an update
    computes what two workers with one each do. The slots are those of a group of full size, its first seat's first; a
    smaller group shares them out as evenly as it can.
    """

    update: int
    number: int  # 0 .. passes - 1, on its worker
    accumulation: int
    worker: Worker

    @property
    def slots(self) -> int:
        """How many parts the update's batch has."""
        return self.worker.seats * self.accumulation

    @property
    def slot(self) -> int:
        """Which of them this is."""
        return self._own.start + self.number

    @property
    def seat(self) -> int:
        """The rank of the worker that has it in a group of full size."""
        return self.slot // self.accumulation

    @property
    def passes(self) -> int:
        """How many its worker takes in an update."""
        return len(self._own)

    @property
    def is_last(self) -> bool:
        """Whether it is the last that its worker takes in the update."""
        return self.number == self.passes - 1

    @property
    def _own(self) -> range:
        rank, size = self.worker.rank, self.worker.world_size
        return range(rank * self.slots // size, (rank + 1) * self.slots // size)

    def next(self) -> "MicroBatch":
        """What its worker takes after it."""
        update, number = (self.update + 1, 0) if self.is_last else (self.update, self.number + 1)
        return self._replace(update=update, number=number)

    def share(self, rows: Tensor) -> Tensor:
        """Its rows of what there is for the whole batch: [batch, ...] to [batch / slots, ...]."""
        return rows[self.slot :: self.slots]


Losses = Callable[[VelocityNetwork, MicroBatch], dict[str, Tensor]]
"""(network, micro-batch) -> the parts of the loss on it by name, scalars."""


class Progress(NamedTuple):
    """What an update says of itself; scalars."""

    losses: dict[str, Tensor]  # the parts of the loss by name: what is minimised is their sum
    diagnostics: dict[str, Tensor]  # metrics of the table that are no part of it


class Learner(Protocol):
    """What the loop trains: one network, or several with an optimizer each."""

    def update(self, number: int) -> Progress:
        """Do update ``number``."""
        ...

    def learning_rate(self) -> float:
        """The learning rate of the last update."""
        ...

    def averaged(self) -> NetworkModule:
        """The network that becomes the model, with its averaged weights, in evaluation mode."""
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
        self.options, precision = options, precision or Precision()
        self.network = network.to(worker.device).train()
        precision.lay_out(self.network)
        self.average = AveragedModel(network, multi_avg_fn=_warmed_average(options.ema_decay)).eval()
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=options.learning_rate,
            betas=(0.9, options.beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.parallel = _data_parallel(network, worker)
        self.forward: VelocityNetwork = precision.wrap(self.parallel)

    def descend(self, loss: Tensor, update: int) -> Tensor:
        """One optimizer step down the gradient of ``loss``, at the learning rate of ``update``; as ``step``."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        return self.step(update)

    def accumulate(self, loss: Callable[[], Tensor], is_last: bool) -> None:
        """Add the gradient of a part of an update's loss; the workers exchange theirs after the last part alone."""
        alone = not is_last and isinstance(self.parallel, nn.parallel.DistributedDataParallel)
        with self.parallel.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            loss().backward()  # type: ignore[no-untyped-call]

    def step(self, update: int) -> Tensor:
        """One optimizer step down the gradients, at the learning rate of ``update``; returns their norm, a scalar."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * learning_rate_factor(update, self.options)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.options.max_gradient_norm)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        return norm.detach()

    def learning_rate(self) -> float:
        """The learning rate of the last update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def averaged(self) -> NetworkModule:
        """The network with its averaged weights, in evaluation mode."""
        return self.average.module  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        """The weights, their average and the optimizer's state."""
        return {
            "network": self.network.state_dict(),
            AVERAGE: self.average.module.state_dict(),
            "averaged_updates": int(self.average.n_averaged),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, which may have been saved in another memory format."""
        self.network.load_state_dict(state["network"])
        self.average.module.load_state_dict(state[AVERAGE])
        self.average.n_averaged.fill_(state["averaged_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        # The fused optimizer reads memory in its order: numbers kept for a weight must lie as the weight does.
        for weight, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if value.shape == weight.shape:
                    kept[name] = torch.empty_like(weight).copy_(value)


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
        self.losses, self.worker = losses, worker

    def update(self, number: int) -> Progress:
        """Do update ``number``: the mean of the losses of its micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        first = MicroBatch(number, 0, self.options.accumulation, self.worker)
        found = [self._add(first._replace(number=n)) for n in range(first.passes)]
        # A worker that takes more passes than others counts for more in the mean over the workers.
        weight = first.passes * self.worker.world_size / first.slots
        means = {name: weight * torch.stack([parts[name] for parts in found]).mean() for name in found[0]}
        return Progress(means, {"gradient_norm": self.step(number)})

    def _add(self, micro: MicroBatch) -> dict[str, Tensor]:
        """Add the gradient of one micro-batch; returns the parts of its loss."""
        parts: dict[str, Tensor] = {}

        def loss() -> Tensor:
            parts.update(self.losses(self.forward, micro))
            # The workers' gradients are averaged over them, whatever the number of passes behind each.
            return torch.stack(list(parts.values())).sum() / (micro.slots / micro.worker.world_size)

        self.accumulate(loss, micro.is_last)
        return {name: part.detach() for name, part in parts.items()}


# Random numbers: functions of (seed, update, slot) alone, so that no random state needs to be saved.
ORDER_STREAM, UPDATE_STREAM, SLOT_STREAM, DROPOUT_STREAM = 1, 2, 3, 4


def seeded(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on the whole ``key``, whose first number is one of the streams."""
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def update_generator(seed: int, update: int) -> torch.Generator:
    """The random numbers that an update's whole batch has in common, on the CPU of every worker alike."""
    return seeded(UPDATE_STREAM, seed, update)


def slot_generator(seed: int, micro: MicroBatch) -> torch.Generator:
    """The random numbers of one micro-batch, on the device of its worker."""
    number = seeded(SLOT_STREAM, seed, micro.update, micro.slot).initial_seed()
    return torch.Generator(micro.worker.device).manual_seed(number)


def seed_dropout(seed: int, micro: MicroBatch) -> None:
    """Let PyTorch's own generators, from which dropout draws, begin anew for a micro-batch."""
    torch.manual_seed(seeded(DROPOUT_STREAM, seed, micro.update, micro.slot).initial_seed())


class EpochOrder:
    """Endless shuffled epochs over ``count`` rows, cut into batches; an epoch is shuffled once, when it begins.

    All that it keeps is the order of the epochs of one batch: 8 bytes a row each.
    """

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
        return torch.randperm(self.count, generator=seeded(ORDER_STREAM, self.seed, epoch))


def learning_rate_factor(update: int, options: OptimizerConfig) -> float:
    """Linear warm-up, then half a cosine down to 0 at the last update, or the same rate to the end."""
    if update < options.warmup_updates:
        return (update + 1) / options.warmup_updates
    if options.schedule == "constant":
        return 1.0
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
