"""The workers of a training run: their number and resources, whether they fit, and what the training costs."""

from typing import NamedTuple

import torch

from kac.networks import NetworkConfig
from kac.networks.cost import TRAINING_CALLS, network_cost, short
from kac.util.errors import ArgumentError
from kac.util.options import Range, most
from pipeline.cluster import connection as cluster
from pipeline.cluster.placement import Resources, wait_for_capacity
from pipeline.config import OptimizerConfig, WorkerOptions


class WorkerGroup(NamedTuple):
    """The workers of a training run and their resources."""

    workers: int | Range  # of Ray Train; 0 means this process
    use_gpu: bool  # whether each worker uses a GPU or a fraction of one
    resources: Resources = Resources(1.0)  # resources per worker

    @property
    def on_gpu(self) -> bool:
        """Whether the training runs on GPUs."""
        return self.use_gpu if self.workers else torch.cuda.is_available()

    def __str__(self) -> str:
        device = "GPU" if self.on_gpu else "CPU"
        if not self.workers:
            return f"in this process on the {device}"
        number = str(self.workers).replace(":", " to ")
        resources = f"a {device}" if self.resources == Resources(1.0, float(self.use_gpu)) else self.resources
        return f"on {number} worker{'s' * (self.workers != 1)} with {resources} each"


def choose_workers(options: WorkerOptions) -> WorkerGroup:
    """Choose the workers of a training run and their resources.

    The default is one worker per GPU, or this process if there is no GPU. A cluster that scales up from zero nodes has
    no GPU yet; there both ``workers`` and ``gpu`` must be set.

    Raises:
        ArgumentError: the options cannot be combined.
    """
    if options.workers == 0:
        group = WorkerGroup(0, use_gpu=False)
    else:
        gpus = cluster.connect().gpus
        use_gpu = gpus > 0 if options.gpu is None else options.gpu
        resources = Resources(
            options.cpus_per_worker, options.gpus_per_worker if use_gpu else 0.0, options.label_selector
        )
        group = WorkerGroup(gpus if options.workers is None else options.workers, use_gpu, resources)
    if options.gpu and not group.on_gpu:
        raise ArgumentError(
            "`gpu` is set, but there is no GPU on this machine or in the cluster. Set `workers` to wait for GPU nodes."
        )
    if options.label_selector and not group.workers:
        raise ArgumentError("`label_selector` selects nodes for workers, but there are no workers. Set `workers`.")
    if options.label_selector and isinstance(group.workers, Range):
        # Ray Train's elastic groups count nodes with any labels, and then wait for workers that cannot start.
        raise ArgumentError(f"`label_selector` requires a fixed number of `workers`, not the range {group.workers}.")
    if group.use_gpu and options.gpus_per_worker < 1 and most(group.workers) > 1:
        raise ArgumentError(  # because NCCL refuses two ranks on one GPU
            f"`gpus_per_worker` is {options.gpus_per_worker:g}, but several workers need whole GPUs. Leave it out, or "
            "use one worker."
        )
    return group


def check_batch_split(optimizer: OptimizerConfig, workers: int | Range) -> None:
    """Check that the workers can split a batch equally.

    Raises:
        ArgumentError: they cannot.
    """
    batch, passes = optimizer.batch_size, optimizer.accumulation
    if workers and batch % (most(workers) * passes):
        parts = f"each of the {passes} parts of a batch of {batch}" if passes > 1 else f"a batch of {batch}"
        raise ArgumentError(
            f"`workers` is {workers}, but {most(workers)} workers cannot split {parts} samples equally. Choose a "
            f"divisor of {batch // passes}."
        )


def await_workers(stage: str, optimizer: OptimizerConfig, group: WorkerGroup) -> None:
    """Wait until the nodes can fit the workers. Raises as ``check_batch_split`` and ``placement.wait_for_capacity``.

    A trial of a sweep does not wait here, because the sweep has done so. If a trial does not fit, a node was lost, and
    ``recovery`` waits for its replacement.
    """
    check_batch_split(optimizer, group.workers)
    if group.workers and not cluster.is_worker():
        wait_for_capacity(stage, "`workers`", group.workers, group.resources)


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
