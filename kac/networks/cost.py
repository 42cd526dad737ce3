"""The cost of a network: parameters, floating-point operations per call, and the memory that training needs."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kac.networks import NetworkConfig, build_network, outline_network
from kac.networks.outside import OutsideConfig

STATE_BYTES = 4 * 5
"""Bytes per parameter in training: float32 weights, averaged weights, gradients, and two moments of AdamW."""

TRAINING_CALLS = 3  # training cost per sample, in forward calls; the backward pass costs about two calls


class NetworkCost(NamedTuple):
    """A network's number of parameters, and its number of floating-point operations per call."""

    parameters: int
    flops_per_call: int  # in the forward pass, per sample; a multiply-add counts as two operations


def network_cost(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> NetworkCost:
    """Return the cost of a network for samples of ``sample_shape``.

    An ``outside`` network is built and called on one sample. For other kinds, nothing is computed or allocated. Only
    matrix products, convolutions and attention count. Raises ``ArgumentError`` if the config does not fit the samples.
    """
    network = outline_network(config, sample_shape, num_classes)
    with torch.device(next(network.parameters()).device):
        conditions = {name: torch.zeros(()) for name in config.conditions}
        sample, t, label = torch.zeros(1, *sample_shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    # The counter misses fused attention on CPUs, and nn.MultiheadAttention is fused unless gradients are enabled.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        network.eval()(sample, t, label, **conditions)
    return NetworkCost(sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops())


class TrainingMemory(NamedTuple):
    """The memory of a training process in bytes, without that of libraries and of the memory allocator."""

    state: int  # float32 weights, averaged weights, gradients and AdamW's two moments
    per_sample: int  # what the forward pass keeps for the backward pass, per sample, in float32

    def __str__(self) -> str:
        """Describe the memory, such as "715 MB for weights and optimizer, and at most 57 MB per sample"."""
        return (
            f"{short(self.state, 'B')} for weights and optimizer, and at most {short(self.per_sample, 'B')} per sample"
        )


def training_memory(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> TrainingMemory:
    """Return the memory to train a network in float32. In bfloat16, a sample needs between half of it and all of it.

    Only shapes are computed, with PyTorch's fake tensors. An ``outside`` network is built and called instead, because
    it may need the values of tensors. The count is the difference between two samples and one,
    because memory that does not depend on the number of samples is not counted.
    """
    with contextlib.nullcontext() if isinstance(config, OutsideConfig) else FakeTensorMode():
        plain = config.model_copy(update={"bounded": False})  # training does not clamp velocities
        network = build_network(plain, sample_shape, num_classes).train()

        def kept_bytes(samples: int) -> int:
            kept = list[Tensor]()

            def keep(tensor: Tensor) -> Tensor:
                kept.append(tensor)
                return tensor

            with saved_tensors_hooks(keep, lambda tensor: tensor):
                conditions = {name: torch.zeros(samples) for name in config.conditions}
                x, label = torch.zeros(samples, *sample_shape), torch.zeros(samples, dtype=torch.int64)
                network(x, torch.zeros(samples), label, **conditions)
            return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}.values())

        parameters = sum(parameter.numel() for parameter in network.parameters())
        return TrainingMemory(STATE_BYTES * parameters, kept_bytes(2) - kept_bytes(1))


def duration(seconds: float) -> str:
    """Format a duration in readable units, such as "2.5 hours", "12 minutes" or "40 seconds"."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} seconds"


def short(number: float, unit: str = "") -> str:
    """Format a large number briefly, such as "1.05 M", or "1.05 MFLOP" if ``unit`` is FLOP."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()
