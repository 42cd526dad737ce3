"""Where the training loop runs: in this process, which may be a trial of Ray Tune, or on workers of Ray Train."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kac import files
from kac.device import default_device
from kac.errors import DistillKacError
from pipeline import cluster
from pipeline.outputs import STATE_FILE, TRAINING_FOLDER
from pipeline.training import recovery
from pipeline.training.learner import Worker
from pipeline.training.loop import Job, averaged_weights, run_updates

OnReport = Callable[[dict[str, float]], None]
"""The metrics of a validation or a checkpoint: see ``loop.Report``."""


class Place(NamedTuple):
    """Where a training runs."""

    workers: int  # of Ray Train; 0: this process
    use_gpu: bool  # whether each of them takes a GPU

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on GPUs."""
        return self.use_gpu if self.workers else torch.cuda.is_available()

    def __str__(self) -> str:
        device = "GPU" if self.on_gpu else "CPU"
        if not self.workers:
            return f"in this process on the {device}"
        return f"on {self.workers} worker{'s' * (self.workers > 1)} with a {device} each"


def choose_place(asked: int | None, gpu: bool | None) -> Place:
    """How many Ray Train workers, and whether each takes a GPU: by default one a GPU, or none and this process.

    A cluster that scales from nothing has no GPU yet: there both must be asked for.
    """
    if asked == 0:
        return Place(0, False)
    gpus = cluster.connect().gpus
    return Place(gpus if asked is None else asked, gpus > 0 if gpu is None else gpu)


def train(job: Job, place: Place, on_report: OnReport | None = None) -> dict[str, Tensor]:
    """Run the loop and return the averaged weights.

    Args:
        place: Ray Train's workers are data-parallel.
        on_report: called at every validation and checkpoint of a loop in this process, and after the last one of
            workers.

    Raises:
        DistillKacError: the batch cannot be split over the workers, or the loss is not finite.
    """
    batch, parts = job.task.optimizer.batch_size, job.task.optimizer.accumulation
    if place.workers and batch % (place.workers * parts):
        passes = f", of {parts} passes an update each" * (parts > 1)
        raise DistillKacError(f"--workers: expected a divisor of the batch size {batch}{passes}, found {place.workers}")
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
    make_trainer = functools.partial(
        TorchTrainer,
        _ray_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=place.workers, use_gpu=place.use_gpu),
        run_config=RunConfig(
            # The same name in the same folder resumes: the folder belongs to one spec.
            name=TRAINING_FOLDER,
            storage_path=location.path,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(location.fs)),
            failure_config=FailureConfig(max_failures=recovery.MAX_FAILURES, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="CRITICAL"),  # its log files have everything
            callbacks=[recovery.say_what_is_lost(job.title)],
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    result = recovery.fit(make_trainer, job.title, job.out, str(place).removeprefix("on "))
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
    worker = Worker(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

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
