"""The cost of a network: the number of parameters, and the number of floating-point operations per call."""

from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kac.networks import NetworkConfig, outline_network

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
