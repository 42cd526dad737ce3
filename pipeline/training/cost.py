"""What a training takes, said before it starts."""

from kac.networks import NetworkConfig
from kac.networks.cost import TRAINING_CALLS, network_cost, short
from kac.precision import Precision
from pipeline.config.specs import OptimizerConfig
from pipeline.tracking import TrackedRun
from pipeline.training.hosts import Place


def describe_cost(
    optimizer: OptimizerConfig,
    network: NetworkConfig,
    sample_shape: tuple[int, ...],
    num_classes: int,
    rows: int,
    calls: float = 1.0,
) -> str:
    """The updates, samples and operations of a training on ``rows`` samples, in words.

    Args:
        calls: of the network for each sample of an update.

    Raises:
        ArgumentError: samples that the network does not fit.
    """
    cost, samples = network_cost(network, sample_shape, num_classes), optimizer.updates * optimizer.batch_size
    whole = short(TRAINING_CALLS * calls * samples * cost.flops_per_call, "FLOP")
    return (
        f"{optimizer.updates:,} updates of {optimizer.batch_size:,} samples, {samples:,} in all: "
        f"{samples / rows:,.1f} epochs of {rows:,}; {short(cost.parameters)} parameters, "
        f"{short(cost.flops_per_call, 'FLOP')} a call, about {whole} in all"
    )


def describe_place(place: Place, precision: Precision) -> str:
    """Where a training runs and how, in words; ``auto`` and its like are what they stand for there."""
    return f"{place}, {precision.on(place.on_gpu)}"


def log_cost(run: TrackedRun, network: NetworkConfig, sample_shape: tuple[int, ...], num_classes: int) -> None:
    """Log what the network costs."""
    run.params(network_cost(network, sample_shape, num_classes)._asdict())
