"""What a network costs: its parameters, and the floating-point operations of one call."""

from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kac.networks import NetworkConfig, outline_network

TRAINING_CALLS = 3
"""Forward calls that one sample of a training costs: its backward pass takes about two."""


class NetworkCost(NamedTuple):
    """What a network costs."""

    parameters: int
    flops_per_call: int  # of one sample, forward; a multiplication and an addition are two


def network_cost(config: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> NetworkCost:
    """The cost of a network for samples of ``sample_shape``; nothing is computed, nothing is allocated.

    A module from outside is built, and computes that one sample.

    Matrix products, convolutions and attention are counted; what works element by element is not.

    Raises:
        ArgumentError: as ``build_network``.
    """
    network = outline_network(config, sample_shape, num_classes)
    with torch.device(next(network.parameters()).device):
        one = {name: torch.zeros(()) for name in config.conditions}
        sample, t, label = torch.zeros(1, *sample_shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    # Fused attention is not counted on CPUs, and without gradients PyTorch has a fused one for nn.MultiheadAttention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        network.eval()(sample, t, label, **one)
    return NetworkCost(sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops())


def duration(seconds: float) -> str:
    """A duration for people: 2.5 hours, 12 minutes, 40 seconds."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} seconds"


def short(number: float, unit: str = "") -> str:
    """A large number for people: 1.05 M, 3.2 T; with a unit 1.05 MFLOP."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()
