"""Describes the cost of a training run and its workers, for the log and for the tracked run."""

from kac.networks import NetworkConfig
from kac.networks.cost import TRAINING_CALLS, network_cost, short
from kac.precision import Precision
from pipeline.config import OptimizerConfig
from pipeline.tracking import TrackedRun
from pipeline.training.hosts import WorkerGroup


def describe_cost(
    optimizer: OptimizerConfig,
    network: NetworkConfig,
    sample_shape: tuple[int, ...],
    num_classes: int,
    rows: int,
    calls: float = 1.0,
) -> str:
    """Describe the updates, samples and operations of training on ``rows`` samples, in one line.

    Args:
        calls: network calls per sample of an update.

    Raises:
        ArgumentError: the network does not fit the samples.
    """
    cost, samples = network_cost(network, sample_shape, num_classes), optimizer.updates * optimizer.batch_size
    total = short(TRAINING_CALLS * calls * samples * cost.flops_per_call, "FLOP")
    return (
        f"{optimizer.updates:,} updates of {optimizer.batch_size:,} samples, {samples:,} in all: "
        f"{samples / rows:,.1f} epochs of {rows:,}; {short(cost.parameters)} parameters, "
        f"{short(cost.flops_per_call, 'FLOP')} per call, about {total} in all"
    )


def describe_workers(group: WorkerGroup, precision: Precision) -> str:
    """Describe where a training runs, and its precision with ``auto`` resolved, in one line."""
    return f"{group}, {precision.resolved(group.on_gpu)}"


def log_cost(run: TrackedRun, network: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> None:
    """Log the parameters and operations of the network."""
    run.params(network_cost(network, sample_shape, num_classes)._asdict())
