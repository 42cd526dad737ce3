"""The learner: a network with its optimizer and its averaged weights."""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kac.losses import LossTerms
from kac.networks import NetworkModule, VelocityNetwork
from kac.precision import Precision
from pipeline.config import OptimizerConfig
from pipeline.tracking import DIAGNOSTIC_PREFIX
from pipeline.training.batches import MicroBatch, Worker

Losses = Callable[[VelocityNetwork, MicroBatch], LossTerms]

AVERAGE = "average"
"""The key of the model's weights in a learner's state."""

GUIDE = "guide"
"""The key of the weights of the model's guide in a learner's state, if the model has a guide."""


class Learner:
    """Trains a network on data-parallel workers, with AdamW and an exponential moving average of the weights.

    To train several networks, a subclass uses an additional learner for each additional network.

    Args:
        network: the network, with initial weights.
        losses: returns the losses of a micro-batch; their sum is minimised.

    Attributes:
        forward: the network that ``losses`` calls, in the chosen precision. Workers average its gradients.
    """

    def __init__(
        self,
        network: NetworkModule,
        losses: Losses,
        options: OptimizerConfig,
        worker: Worker,
        precision: Precision | None = None,
    ) -> None:
        self.losses, self.options, self.worker, precision = losses, options, worker, precision or Precision()
        self.network = network.to(worker.device).train()
        precision.set_memory_format(self.network)
        self.average, self.averaged_updates = copy.deepcopy(network).eval(), 0
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=options.learning_rate,
            betas=(0.9, options.beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.parallel: nn.Module = network
        if worker.world_size > 1 and dist.is_initialized():
            device_ids = [worker.device.index] if worker.device.type == "cuda" else None
            # The gradients are views of the buffers that workers exchange, which saves a copy of them.
            self.parallel = nn.parallel.DistributedDataParallel(
                network, device_ids=device_ids, gradient_as_bucket_view=True
            )
        self.forward: VelocityNetwork = precision.wrap(self.parallel)

    def update(self, number: int) -> LossTerms:
        """Perform update ``number``. Return its micro-batches' mean losses, and diagnostics under prefixed names."""
        self.optimizer.zero_grad(set_to_none=True)
        first = MicroBatch(number, 0, self.options.accumulation, self.worker)
        passes = [self._add_gradient(first._replace(number=n)) for n in range(first.passes)]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.options)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.options.max_gradient_norm)
        self.optimizer.step()
        self._update_average()
        # In the mean over workers, a worker with more passes has more weight.
        weight = first.passes * self.worker.world_size / first.slots

        def means(terms: list[dict[str, Tensor]], prefix: str = "") -> dict[str, Tensor]:
            return {f"{prefix}{name}": weight * torch.stack([each[name] for each in terms]).mean() for name in terms[0]}

        diagnostics = means([terms.diagnostics for terms in passes], DIAGNOSTIC_PREFIX)
        return LossTerms(means([terms.losses for terms in passes]), {**diagnostics, "gradient_norm": norm.detach()})

    def _add_gradient(self, micro: MicroBatch) -> LossTerms:
        """Add the gradient of one micro-batch. Workers exchange gradients only after their last micro-batch."""
        is_local = micro.number < micro.passes - 1 and isinstance(self.parallel, nn.parallel.DistributedDataParallel)
        with self.parallel.no_sync() if is_local else contextlib.nullcontext():  # type: ignore[operator]
            terms = self.losses(self.forward, micro)
            # DistributedDataParallel gives all workers the same weight, even if their numbers of passes differ.
            loss = torch.stack(list(terms.losses.values())).sum() / (micro.slots / micro.worker.world_size)
            loss.backward()  # type: ignore[no-untyped-call]
        return LossTerms(
            {name: value.detach() for name, value in terms.losses.items()},
            # A diagnostic may be an integer tensor, or a tensor on the CPU.
            {name: value.detach().to(self.worker.device, torch.float32) for name, value in terms.diagnostics.items()},
        )

    @torch.no_grad()
    def _update_average(self) -> None:
        """Update the moving average. Its decay starts low, so that the initial weights are forgotten quickly.

        PyTorch's ``AveragedModel`` would wait for the GPU, from which it reads its count of updates.
        """
        count = self.averaged_updates
        decay = min(self.options.ema_decay, (1 + count) / (10 + count)) if count else 0.0
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        for averaged, current in zip(self.average.buffers(), self.network.buffers(), strict=True):
            averaged.copy_(current)
        self.averaged_updates += 1

    def averaged(self) -> NetworkModule:
        """The network with its averaged weights, in evaluation mode."""
        return self.average

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from. The model's weights are under the key ``AVERAGE``."""
        return {
            "network": self.network.state_dict(),
            AVERAGE: self.average.state_dict(),
            "averaged_updates": self.averaged_updates,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state, which may have a different memory format."""
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state[AVERAGE])
        self.averaged_updates = state["averaged_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        # The fused optimizer requires each moment to have the memory format of its weight.
        for weight, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == weight.shape:
                    moments[name] = torch.empty_like(weight).copy_(value)


def learning_rate(update: int, options: OptimizerConfig) -> float:
    """The learning rate of an update: a linear warm-up, then either half a cosine period down to 0 or a constant."""
    if update < options.warmup_updates:
        return options.learning_rate * ((update + 1) / options.warmup_updates)
    if options.schedule == "constant":
        return options.learning_rate
    share = (update - options.warmup_updates) / max(1, options.updates - options.warmup_updates)
    return options.learning_rate * (0.5 * (1 + math.cos(math.pi * share)))
