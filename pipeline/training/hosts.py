"""Run the training loop in this process (which may be a Ray Tune trial) or on Ray Train workers.

A range of workers runs as an elastic worker group (Ray Train 2.60). Ray Train checks once a minute whether the group
can grow. It counts all of the nodes' resources, including resources that other jobs use. If a group does not fit, its
start fails after a minute (RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S), and ``recovery`` starts a smaller group.
"""

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kac.model import ModelConfig
from kac.networks.cost import TRAINING_CALLS, NetworkCost, network_cost, short
from kac.util import files
from kac.util.device import default_device
from kac.util.errors import ArgumentError, DistillKacError
from kac.util.options import Range, most
from pipeline import claims, outputs
from pipeline.cluster import connection as cluster
from pipeline.cluster.placement import HIDE_GPUS, Resources, wait_for_capacity
from pipeline.config import DistillSpec, OptimizerConfig, TeachSpec, WorkerOptions
from pipeline.outputs import STATE_FILE, TRAINING_FOLDER
from pipeline.tracking import TrackedRun
from pipeline.training import recovery
from pipeline.training.batches import Worker
from pipeline.training.loop import Job, Task, averaged_weights, newest, run_updates
from pipeline.training.validation import HeldOut, Validation

OnReport = Callable[[dict[str, float]], None]
"""Called with the metrics of a validation or a checkpoint; see ``loop.Report``."""


class WorkerGroup(NamedTuple):
    """The workers of a training run, and the resources that each worker needs."""

    workers: int | Range  # number of Ray Train workers; 0 means this process
    resources: Resources = Resources(1.0)

    @property
    def on_gpu(self) -> bool:
        """Whether training runs on GPUs."""
        return self.resources.gpus > 0 if self.workers else torch.cuda.is_available()

    def __str__(self) -> str:
        if not self.workers:
            return f"in this process on the {'GPU' if self.on_gpu else 'CPU'}"
        number = str(self.workers).replace(":", " to ")
        return f"on {number} worker{'s' * (self.workers != 1)} with {self.resources} each"


def choose_workers(options: WorkerOptions) -> WorkerGroup:
    """Choose the workers of a training run, and the resources that each worker needs.

    The default is one worker per GPU, or this process if there is no GPU. A cluster that scales up from zero nodes has
    no GPU yet, so ``workers`` and ``gpu`` must be set on such a cluster.

    Raises:
        ArgumentError: the options cannot be combined.
    """
    group = WorkerGroup(0)
    if options.workers != 0:
        gpus = cluster.connect().gpus
        gpus_each = options.gpus_per_worker if (gpus > 0 if options.gpu is None else options.gpu) else 0.0
        resources = Resources(options.cpus_per_worker, gpus_each, options.label_selector)
        group = WorkerGroup(gpus if options.workers is None else options.workers, resources)
    if options.gpu is False and group.on_gpu:
        raise ArgumentError(f"`gpu` False with `workers` 0 {HIDE_GPUS}")
    if options.gpu and not group.on_gpu:
        raise ArgumentError(
            "`gpu` is set, but there is no GPU on this machine or in the cluster. Set `workers` to wait for GPU nodes."
        )
    if options.label_selector and not group.workers:
        raise ArgumentError("`label_selector` selects nodes for workers, but there are no workers. Set `workers`.")
    if options.label_selector and isinstance(group.workers, Range):
        # Ray Train ignores labels when it sizes an elastic group, and then waits for workers that cannot start.
        raise ArgumentError(f"`label_selector` requires a fixed number of `workers`, not the range {group.workers}.")
    if 0 < group.resources.gpus < 1 and most(group.workers) > 1:
        raise ArgumentError(  # because NCCL refuses two ranks on one GPU
            f"`gpus_per_worker` is {options.gpus_per_worker:g}, but with more than one worker, each needs a whole GPU. "
            "Leave out `gpus_per_worker`, or use one worker."
        )
    return group


def check_batch_split(optimizer: OptimizerConfig, workers: int | Range) -> None:
    """Raise ``ArgumentError`` unless the workers can split a batch equally."""
    batch, passes = optimizer.batch_size, optimizer.accumulation
    if workers and batch % (most(workers) * passes):
        parts = f"each of the {passes} parts of a batch of {batch}" if passes > 1 else f"a batch of {batch}"
        raise ArgumentError(
            f"`workers` is {workers}, but {most(workers)} workers cannot split {parts} samples equally. Choose a "
            f"divisor of {batch // passes}."
        )


def await_workers(stage: str, optimizer: OptimizerConfig, group: WorkerGroup) -> None:
    """Wait until the nodes can fit the workers.

    A trial does not wait here: its sweep has already waited, and ``recovery`` waits if nodes are lost later.

    Raises:
        ArgumentError: the workers cannot split a batch, or no nodes can provide the resources.
    """
    check_batch_split(optimizer, group.workers)
    if group.workers and not cluster.is_worker():
        wait_for_capacity(stage, "`workers`", group.workers, group.resources)


def describe_cost(optimizer: OptimizerConfig, network: NetworkCost, rows: int, calls: float = 1.0) -> str:
    """Describe in one line the updates, samples and FLOPs of training on ``rows`` samples.

    ``calls`` is the number of network calls per sample of an update.
    """
    samples = optimizer.updates * optimizer.batch_size
    total = short(TRAINING_CALLS * calls * samples * network.flops_per_call, "FLOP")
    return (
        f"{optimizer.updates:,} updates of {optimizer.batch_size:,} samples, {samples:,} in all: "
        f"{samples / rows:,.1f} epochs of {rows:,}; {short(network.parameters)} parameters, "
        f"{short(network.flops_per_call, 'FLOP')} per call, about {total} in all"
    )


def train_model(
    spec: TeachSpec | DistillSpec,
    task: Task,
    title: str,
    config: ModelConfig,
    run: TrackedRun,
    group: WorkerGroup,
    on_report: OnReport | None,
    held_out: HeldOut | None = None,
) -> ModelConfig:
    """Train a model with ``train`` and write its folder. Return its config with the hash of its weights."""
    run.params(network_cost(config.network, config.sample_shape, config.num_classes)._asdict())
    precision = spec.precision.model_copy(update={"compile": False})  # compiling does not pay off for so few calls
    validation = Validation(spec.validation_updates, config, spec.optimizer, precision, held_out, spec.sample_updates)
    claim = claims.token_of(spec.out)
    job = Job(task, title, spec.out, run, spec.checkpoint_updates, spec.checkpoint_seconds, validation, claim)
    return outputs.write_model(spec.out, config, train(job, group, on_report), run)


def train(job: Job, group: WorkerGroup, on_report: OnReport | None = None) -> dict[str, Tensor]:
    """Run the training loop and return the averaged weights.

    Ray Train workers are data-parallel. Any number of workers within a range gives the same result. When the number
    changes, training resumes from the last checkpoint. If there are workers, ``on_report`` is called once, at the end.

    Raises:
        DistillKacError: the loss is not finite, or the workers fail repeatedly.
    """
    state = _train_on_ray(job, group, on_report) if group.workers else _train_here(job, on_report)
    return averaged_weights(state)


def _train_here(job: Job, on_report: OnReport | None) -> bytes:
    folder = files.join(job.out, TRAINING_FOLDER)
    path = files.join(folder, STATE_FILE)
    of_workers = [name for name in files.list_sizes(folder) if name.endswith(f"/{STATE_FILE}")]  # in order of time
    saved = [path, *(files.join(folder, name) for name in of_workers[-1:])]
    resume = newest([files.read_bytes(name) for name in saved if files.exists(name)])

    def report(metrics: dict[str, float], state: bytes | None) -> None:
        if state is not None:
            files.write_bytes(path, state)
        if on_report is not None:
            on_report(metrics)

    return run_updates(job, Worker(0, 1, default_device()), report, resume)


def _train_on_ray(job: Job, group: WorkerGroup, on_report: OnReport | None) -> bytes:
    import pyarrow.fs
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    location = files.locate(job.out)
    max_workers = group.workers.most if isinstance(group.workers, Range) else None
    run_config = RunConfig(
        # Ray Train resumes the run of this name if the folder has one. Each folder belongs to one spec.
        name=TRAINING_FOLDER,
        storage_path=location.path,
        storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(location.fs)),
        # Only recovery.fit restarts failed runs.
        failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        logging_config=LoggingConfig(log_level="CRITICAL"),  # Ray's log files still contain all lines
        checkpoint_config=CheckpointConfig(num_to_keep=2),
    )

    def make_trainer(workers: int | Range) -> TorchTrainer:
        scaling_config = ScalingConfig(
            num_workers=(workers.least, workers.most) if isinstance(workers, Range) else workers,
            use_gpu=group.resources.gpus > 0,
            resources_per_worker=group.resources.by_ray_name,
            label_selector=dict(group.resources.label_selector) or None,
        )
        options = {"job": job, "max_workers": max_workers}
        return TorchTrainer(
            _ray_worker, train_loop_config=options, scaling_config=scaling_config, run_config=run_config
        )

    result = recovery.fit(make_trainer, job.title, job.out, group.workers, group.resources)
    if result.checkpoint is None:
        raise DistillKacError(f"{job.out}: training ended without a checkpoint.")
    if on_report is not None:
        on_report(result.metrics)
    return _state_in(result.checkpoint)


def _ray_worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    cluster.quiet("ray.train")
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    worker = Worker(context.get_world_rank(), context.get_world_size(), device, config["max_workers"])
    latest = ray.train.get_checkpoint()
    states = [] if latest is None else [_state_in(latest)]
    in_process = files.join(files.join(config["job"].out, TRAINING_FOLDER), STATE_FILE)
    if files.exists(in_process):  # training in one process continues on workers
        states.append(files.read_bytes(in_process))
    resume = newest(states)
    host = _RayTrain(config["job"].out, is_main=worker.rank == 0)
    run_updates(config["job"], worker, host.report, resume, host.is_draining)


class _RayTrain:
    """Reports to Ray Train, and asks it whether a worker's node is draining, which means about to leave the cluster."""

    def __init__(self, out: str, is_main: bool) -> None:
        self._folder, self._is_main, self._is_draining = files.join(out, TRAINING_FOLDER), is_main, False
        self._may_write = threading.Event()
        self._may_write.set()

    def is_draining(self) -> bool:
        """Whether the node of any worker is draining. All workers must call this together."""
        import ray.train

        self._is_draining = ray.train.get_preemption_info() is not None
        return self._is_draining

    def report(self, metrics: dict[str, float], state: bytes | None) -> None:
        """Report as ``loop.Report``. A thread writes the state, once the previous state is written.

        Raises:
            NodeDrainingError: a node is draining, and the state is saved.
        """
        import ray.train

        options: dict[str, Any] = {}
        if self._is_main and state is not None:
            self._may_write.wait()
            self._may_write.clear()
            options = {
                "checkpoint": self._checkpoint(""),  # passed to the next function, which returns the real checkpoint
                "checkpoint_upload_fn": functools.partial(self._write, state),
                "delete_local_checkpoint_after_upload": False,
            }
        ray.train.report(metrics, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC, **options)
        if self._is_draining and state is not None:
            # An error stops all workers, so wait until Ray Train has registered the checkpoint.
            ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)
            raise recovery.NodeDrainingError(f"a node is draining; saved after update {metrics['update']:.0f}")

    def _write(self, state: bytes, _: Any, name: str) -> Any:
        try:
            files.write_bytes(files.join(self._folder, f"{name}/{STATE_FILE}"), state)
            return self._checkpoint(name)
        finally:
            self._may_write.set()

    def _checkpoint(self, name: str) -> Any:
        import ray.train

        # Ray Train refuses an equal filesystem that another thread made.
        storage = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)


def _state_in(checkpoint: Any) -> bytes:
    """The training state in a Ray Train checkpoint."""
    with checkpoint.as_directory() as folder:
        return Path(folder, STATE_FILE).read_bytes()
