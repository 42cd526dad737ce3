"""Learners: networks with their optimizers and averages, and the batches and random numbers of an update."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kac.losses import LossTerms
from kac.networks import NetworkModule, VelocityNetwork
from kac.precision import Precision
from pipeline.config import OptimizerConfig
from pipeline.tracking import DIAGNOSTIC_PREFIX

Tensors = tuple[Tensor, ...] | list[Tensor]

AVERAGE = "average"
"""Key of a learner's state that holds the weights of the model."""


class Worker(NamedTuple):
    """One copy of the training loop."""

    rank: int
    world_size: int
    device: torch.device
    max_workers: int | None = None  # maximum number of workers, if their number may change

    @property
    def seats(self) -> int:
        """The number of workers for which a batch is split. A smaller group takes several parts per worker."""
        return self.max_workers or self.world_size


class MicroBatch(NamedTuple):
    """One part of an update's batch, which a worker processes in one pass.

    The batch has a fixed number of slots: ``accumulation`` per seat of a group of full size, ordered by seat. A smaller
    group distributes the slots as evenly as possible. The random numbers of a micro-batch depend on its slot and not on
    its worker, so one worker with two micro-batches per update computes the same as two workers with one each.
    """

    update: int
    number: int  # 0 .. passes - 1 on its worker
    accumulation: int
    worker: Worker

    @property
    def slots(self) -> int:
        """The number of parts of the update's batch."""
        return self.worker.seats * self.accumulation

    @property
    def slot(self) -> int:
        """The index of this part in the batch."""
        return self._slots_of_worker.start + self.number

    @property
    def seat(self) -> int:
        """The rank of the worker that has this part in a group of full size."""
        return self.slot // self.accumulation

    @property
    def passes(self) -> int:
        """The number of micro-batches of its worker per update."""
        return len(self._slots_of_worker)

    @property
    def is_last(self) -> bool:
        """Whether this is the last micro-batch of its worker in the update."""
        return self.number == self.passes - 1

    @property
    def _slots_of_worker(self) -> range:
        rank, size = self.worker.rank, self.worker.world_size
        return range(rank * self.slots // size, (rank + 1) * self.slots // size)

    def next(self) -> "MicroBatch":
        """The micro-batch that its worker processes next."""
        update, number = (self.update + 1, 0) if self.is_last else (self.update, self.number + 1)
        return self._replace(update=update, number=number)

    def share(self, rows: Tensor) -> Tensor:
        """The rows of a whole batch that belong to this part: [batch, ...] to [batch / slots, ...]."""
        return rows[self.slot :: self.slots]


Losses = Callable[[VelocityNetwork, MicroBatch], LossTerms]
"""(network, micro-batch) -> the parts of the loss, and diagnostics."""


class Progress(NamedTuple):
    """The scalars of one update."""

    losses: dict[str, Tensor]  # the parts of the loss by name; their sum is minimised
    diagnostics: dict[str, Tensor]  # other metrics by their full name


class Learner(Protocol):
    """What the loop trains: one network, or several networks with one optimizer each."""

    def update(self, number: int) -> Progress:
        """Do update ``number``."""
        ...

    def learning_rate(self) -> float:
        """The learning rate of the last update."""
        ...

    def averaged(self) -> NetworkModule:
        """The network of the future model, with averaged weights, in evaluation mode."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, with the weights of the model under ``AVERAGE``."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        ...


class TrainedNetwork:
    """A network in training: data-parallel, with AdamW and an exponential moving average of its weights.

    Attributes:
        forward: the network for the loss, in its precision; its gradients are averaged over the workers.
    """

    def __init__(
        self, network: NetworkModule, options: OptimizerConfig, worker: Worker, precision: Precision | None = None
    ) -> None:
        self.options, precision = options, precision or Precision()
        self.network = network.to(worker.device).train()
        precision.set_memory_format(self.network)
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
        """Compute the gradient of ``loss`` and take one optimizer step; see ``step``."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        return self.step(update)

    def accumulate(self, loss: Callable[[], Tensor], is_last: bool) -> None:
        """Add the gradient of one part of an update's loss. Workers exchange gradients only after the last part."""
        is_local = not is_last and isinstance(self.parallel, nn.parallel.DistributedDataParallel)
        with self.parallel.no_sync() if is_local else contextlib.nullcontext():  # type: ignore[operator]
            loss().backward()  # type: ignore[no-untyped-call]

    def step(self, update: int) -> Tensor:
        """Take one optimizer step at the learning rate of ``update``. Return the unclipped gradient norm, a scalar."""
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
        """The weights, their average and the state of the optimizer."""
        return {
            "network": self.network.state_dict(),
            AVERAGE: self.average.module.state_dict(),
            "averaged_updates": int(self.average.n_averaged),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state, which may have another memory format."""
        self.network.load_state_dict(state["network"])
        self.average.module.load_state_dict(state[AVERAGE])
        self.average.n_averaged.fill_(state["averaged_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        # The fused optimizer requires its moments to have the memory format of their weight.
        for weight, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == weight.shape:
                    moments[name] = torch.empty_like(weight).copy_(value)


class NetworkLearner(TrainedNetwork):
    """A learner with one network."""

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
        """Do update ``number`` on the mean loss of its micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        first = MicroBatch(number, 0, self.options.accumulation, self.worker)
        passes = [self._add_gradient(first._replace(number=n)) for n in range(first.passes)]
        # A worker with more passes than others has more weight in the mean over the workers.
        weight = first.passes * self.worker.world_size / first.slots

        def means(terms: list[dict[str, Tensor]], prefix: str = "") -> dict[str, Tensor]:
            return {f"{prefix}{name}": weight * torch.stack([each[name] for each in terms]).mean() for name in terms[0]}

        diagnostics = means([terms.diagnostics for terms in passes], DIAGNOSTIC_PREFIX)
        return Progress(means([terms.losses for terms in passes]), {**diagnostics, "gradient_norm": self.step(number)})

    def _add_gradient(self, micro: MicroBatch) -> LossTerms:
        """Add the gradient of one micro-batch. Return the scalars of its loss, detached."""
        terms = LossTerms({})

        def loss() -> Tensor:
            nonlocal terms
            terms = self.losses(self.forward, micro)
            # DistributedDataParallel takes the mean over workers, whatever their number of passes.
            return torch.stack(list(terms.losses.values())).sum() / (micro.slots / micro.worker.world_size)

        self.accumulate(loss, micro.is_last)
        return LossTerms(
            {name: value.detach() for name, value in terms.losses.items()},
            # A diagnostic may be a count, or computed on the CPU.
            {name: value.detach().to(self.worker.device, torch.float32) for name, value in terms.diagnostics.items()},
        )


# Random numbers depend only on (seed, update, slot), so that checkpoints need no random state.
ORDER_STREAM, UPDATE_STREAM, SLOT_STREAM, DROPOUT_STREAM = 1, 2, 3, 4


def seeded(*key: int) -> torch.Generator:
    """A CPU generator seeded by all numbers of ``key``. The first number is one of the streams above."""
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def update_generator(seed: int, update: int) -> torch.Generator:
    """A CPU generator for numbers that the whole batch of an update shares; the same on every worker."""
    return seeded(UPDATE_STREAM, seed, update)


def slot_generator(seed: int, micro: MicroBatch) -> torch.Generator:
    """A generator for one micro-batch, on the device of its worker."""
    number = seeded(SLOT_STREAM, seed, micro.update, micro.slot).initial_seed()
    return torch.Generator(micro.worker.device).manual_seed(number)


def seed_dropout(seed: int, micro: MicroBatch) -> None:
    """Seed PyTorch's global generators, which dropout uses, for a micro-batch."""
    torch.manual_seed(seeded(DROPOUT_STREAM, seed, micro.update, micro.slot).initial_seed())


class EpochOrder:
    """Endless shuffled epochs over ``count`` rows, split into batches. Each epoch is shuffled once.

    It keeps only the order of the epochs in the current batch: 8 bytes per row and epoch.
    """

    def __init__(self, seed: int, count: int, batch_size: int) -> None:
        self.seed, self.count, self.batch_size = seed, count, batch_size
        self._shuffled: dict[int, Tensor] = {}

    def batch(self, update: int) -> Tensor:
        """The row numbers of an update's batch: [batch_size], int64."""
        first, last = update * self.batch_size, (update + 1) * self.batch_size
        epochs = range(first // self.count, (last - 1) // self.count + 1)
        known = self._shuffled
        self._shuffled = {epoch: known[epoch] if epoch in known else self._shuffle(epoch) for epoch in epochs}
        order = torch.cat(list(self._shuffled.values())) if len(epochs) > 1 else self._shuffled[epochs.start]
        return order[first - epochs.start * self.count :][: self.batch_size]

    def _shuffle(self, epoch: int) -> Tensor:
        return torch.randperm(self.count, generator=seeded(ORDER_STREAM, self.seed, epoch))


def learning_rate_factor(update: int, options: OptimizerConfig) -> float:
    """The factor on the learning rate: a linear warm-up, then either half a cosine down to 0 or a constant 1."""
    if update < options.warmup_updates:
        return (update + 1) / options.warmup_updates
    if options.schedule == "constant":
        return 1.0
    share = (update - options.warmup_updates) / max(1, options.updates - options.warmup_updates)
    return 0.5 * (1 + math.cos(math.pi * share))


def _warmed_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """An exponential moving average whose decay starts low, so that the initial weights are forgotten quickly."""

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
