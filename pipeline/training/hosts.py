"""Where the training loop runs: in this process, which may be a trial of Ray Tune, or on workers of Ray Train.

A range of workers is Ray Train's elastic group (Ray 2.60). It looks for more room once a minute, and counts what nodes
have, not what other work leaves of it: a group that does not fit gives up after a minute
(RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S) and begins smaller; see ``recovery``.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kac.util import files
from kac.util.device import default_device
from kac.util.errors import ArgumentError, DistillKacError
from kac.util.options import Range, least, most
from pipeline import claims
from pipeline.cluster import connection as cluster
from pipeline.cluster.placement import Share, await_room
from pipeline.config.specs import DistillSpec, OptimizerConfig, TeachSpec
from pipeline.outputs import STATE_FILE, TRAINING_FOLDER
from pipeline.training import recovery
from pipeline.training.learner import Worker
from pipeline.training.loop import Job, averaged_weights, run_updates

OnReport = Callable[[dict[str, float]], None]
"""The metrics of a validation or a checkpoint: see ``loop.Report``."""


class Place(NamedTuple):
    """Where a training runs."""

    workers: int | Range  # of Ray Train; 0: this process
    use_gpu: bool  # whether each of them takes a GPU, or a share of one
    share: Share = Share(1.0)  # what each of them takes of a node

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on GPUs."""
        return self.use_gpu if self.workers else torch.cuda.is_available()

    def __str__(self) -> str:
        device = "GPU" if self.on_gpu else "CPU"
        if not self.workers:
            return f"in this process on the {device}"
        number = f"{least(self.workers)} to {most(self.workers)}" if isinstance(self.workers, Range) else self.workers
        if self.share == Share(1.0, float(self.use_gpu)):
            return f"on {number} worker{'s' * (self.workers != 1)} with a {device} each"
        return f"on {number} worker{'s' * (self.workers != 1)} with {self.share} each"


def choose_place(spec: TeachSpec | DistillSpec) -> Place:
    """How many Ray Train workers, and what each takes: by default one a GPU, or none and this process.

    A cluster that scales from nothing has no GPU yet: there both must be asked for.

    Raises:
        ArgumentError: options that do not go together.
    """
    if spec.workers == 0:
        return _checked(spec, Place(0, False))
    gpus = cluster.connect().gpus
    use_gpu = gpus > 0 if spec.gpu is None else spec.gpu
    share = Share(spec.cpus_per_worker, spec.gpus_per_worker if use_gpu else 0.0, spec.label_selector)
    return _checked(spec, Place(gpus if spec.workers is None else spec.workers, use_gpu, share))


def _checked(spec: TeachSpec | DistillSpec, place: Place) -> Place:
    if spec.gpu and not place.on_gpu:
        raise ArgumentError("`gpu`: expected a GPU here or in the cluster, found none: add `workers` to wait for some")
    if spec.label_selector and not place.workers:
        raise ArgumentError("`label_selector`: expected workers to be placed, found none: add `workers`")
    if spec.label_selector and isinstance(place.workers, Range):
        # Its elastic groups count the room on nodes of any labels, and then wait for workers that cannot start.
        raise ArgumentError(f"`label_selector`: expected a fixed number of `workers`, found {place.workers}")
    if place.use_gpu and spec.gpus_per_worker < 1 and most(place.workers) > 1:
        # NCCL refuses two ranks on one GPU.
        raise ArgumentError(
            f"`gpus_per_worker`: expected whole GPUs for several workers, found {spec.gpus_per_worker:g}: "
            "leave it out, or take one worker"
        )
    return place


def check_shares(optimizer: OptimizerConfig, workers: int | Range) -> None:
    """Refuse workers that cannot share a batch equally.

    Raises:
        ArgumentError: it says so.
    """
    batch, parts = optimizer.batch_size, optimizer.accumulation
    if workers and batch % (most(workers) * parts):
        passes = f", of {parts} passes an update each" * (parts > 1)
        raise ArgumentError(f"`workers`: expected a divisor of the batch size {batch}{passes}, found {workers}")


def await_workers(stage: str, optimizer: OptimizerConfig, place: Place) -> None:
    """Return once the cluster has room for the workers; raises as ``check_shares`` and ``placement.await_room``.

    The driver of a sweep has asked for its trials: one that finds less has lost a node; ``recovery`` waits for that.
    """
    check_shares(optimizer, place.workers)
    if place.workers and not cluster.is_worker():
        await_room(stage, "`workers`", place.workers, place.share)


def train(job: Job, place: Place, on_report: OnReport | None = None) -> dict[str, Tensor]:
    """Run the loop and return the averaged weights.

    Args:
        place: Ray Train's workers are data-parallel. Between the ends of a range any number of them computes the same;
            where it changes, they go on from the last checkpoint.
        on_report: called at every validation and checkpoint of a loop in this process, and after the last one of
            workers.

    Raises:
        DistillKacError: the loss is not finite, or the workers fail again and again.
    """
    job = replace(job, claim=claims.token_of(job.out))
    done = _train_on_ray(job, place, on_report) if place.workers else _train_here(job, on_report)
    return averaged_weights(done)


def _train_here(job: Job, on_report: OnReport | None) -> bytes:
    path = files.join(files.join(job.out, TRAINING_FOLDER), STATE_FILE)
    resume = files.read_bytes(path) if files.exists(path) else None

    def report(metrics: dict[str, float], state: bytes | None) -> None:
        if state is not None:
            files.write_bytes(path, state)
        if on_report is not None:
            on_report(metrics)

    return run_updates(job, Worker(0, 1, default_device()), report, resume)


def _train_on_ray(job: Job, place: Place, on_report: OnReport | None) -> bytes:
    import pyarrow.fs
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    location = files.locate(job.out)

    def make_trainer(workers: int | Range) -> TorchTrainer:
        return TorchTrainer(
            _ray_worker,
            train_loop_config={"job": job, "most": place.workers.most if isinstance(place.workers, Range) else None},
            scaling_config=ScalingConfig(
                num_workers=(workers.least, workers.most) if isinstance(workers, Range) else workers,
                use_gpu=place.use_gpu,
                resources_per_worker=place.share.resources,
                label_selector=dict(place.share.label_selector) or None,
            ),
            run_config=RunConfig(
                # The same name in the same folder resumes: the folder belongs to one spec.
                name=TRAINING_FOLDER,
                storage_path=location.path,
                storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(location.fs)),
                # It starts again in recovery.fit, if at all.
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
                logging_config=LoggingConfig(log_level="CRITICAL"),  # its log files have everything
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )

    result = recovery.fit(make_trainer, job.title, job.out, place.workers, place.share)
    if result.checkpoint is None:
        raise DistillKacError(f"{job.out}: training ended without a checkpoint")
    if on_report is not None:
        on_report(result.metrics)
    return _state_in(result.checkpoint)


def _ray_worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    cluster.quiet("ray.train")
    job: Job = config["job"]
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    worker = Worker(context.get_world_rank(), context.get_world_size(), device, config["most"])

    def report(metrics: dict[str, float], state: bytes | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if worker.rank == 0 and state is not None:
                Path(folder, STATE_FILE).write_bytes(state)
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint)

    latest = ray.train.get_checkpoint()
    run_updates(job, worker, report, None if latest is None else _state_in(latest))


def _state_in(checkpoint: Any) -> bytes:
    """The training state in a checkpoint of Ray Train."""
    with checkpoint.as_directory() as folder:
        return Path(folder, STATE_FILE).read_bytes()
