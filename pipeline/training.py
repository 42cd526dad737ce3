"""The training loop, written once: under Ray Train on any number of workers, or in the calling process.

What one update does is a function of (task, update, rank, world size) alone: no random state needs to be saved, and a
resumed run goes on as if it had not been stopped.
"""

import io
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kac import files
from kac.errors import DistillKacError
from pipeline import cluster
from pipeline.config import OptimizerConfig
from pipeline.tracking import TrackedRun

TRAINING_FOLDER = "training"
STATE_FILE = "state.pt"
LOG_UPDATES = 50
MAX_FAILURES = 3
"""A worker group that fails more often is a fault to be seen, not to be retried."""

Loss = Callable[[nn.Module, int], Tensor]
"""(network, update) -> this worker's loss of the update, a scalar."""

Tensors = tuple[Tensor, ...] | list[Tensor]

Report = Callable[[dict[str, float], bytes | None], None]
"""(metrics, training state or None): called equally often by every worker."""


class Worker(NamedTuple):
    """Where a copy of the loop runs."""

    rank: int
    world_size: int
    device: torch.device


class Task(Protocol):
    """What is trained: picklable, so that it travels to workers."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """How it is trained."""
        ...

    def build(self, worker: Worker) -> tuple[nn.Module, Loss]:
        """The network with its first weights, and its loss."""
        ...


@dataclass(frozen=True)
class Job:
    """A task, and how its run is kept."""

    task: Task
    title: str
    out: str
    run: TrackedRun
    checkpoint_updates: int


def seeded(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on the whole ``key``."""
    word = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def generator(seed: int, update: int, worker: Worker) -> torch.Generator:
    """The random numbers of one worker's update, on its device."""
    on_cpu = seeded(seed, update, worker.rank)
    if worker.device.type == "cpu":
        return on_cpu
    return torch.Generator(worker.device).manual_seed(on_cpu.initial_seed())


def choose_workers(asked: int | None, gpu: bool | None) -> tuple[int, bool]:
    """How many Ray Train workers, and whether each takes a GPU: by default one a GPU, or none and this process.

    A cluster that scales from nothing has no GPU yet: there both must be asked for.
    """
    if asked == 0:
        return 0, False
    gpus = cluster.connect().gpus
    return (gpus if asked is None else asked), (gpus > 0 if gpu is None else gpu)


def train(job: Job, workers: int, use_gpu: bool = False) -> dict[str, Tensor]:
    """Run the loop and return the averaged weights.

    Args:
        workers: 0 runs it in this process; more run under Ray Train, data-parallel.

    Raises:
        DistillKacError: the batch cannot be split over the workers, or the loss is not finite.
    """
    if workers and job.task.optimizer.batch_size % workers:
        raise DistillKacError(
            f"--workers: expected a divisor of the batch size {job.task.optimizer.batch_size}, found {workers}"
        )
    state = train_here(job) if workers == 0 else _train_on_ray(job, workers, use_gpu)
    return averaged_weights(state)


def averaged_weights(state: bytes) -> dict[str, Tensor]:
    """The EMA's weights in a training state: they are the model."""
    return _load_state(state)["ema"]  # type: ignore[no-any-return]


def finish(out: str) -> None:
    """Remove the training state, once the model is written."""
    files.remove_tree(files.join(out, TRAINING_FOLDER))


def train_here(job: Job, report: Report | None = None) -> bytes:
    """The loop in this process: on the laptop, and in a Tune trial."""
    path = files.join(files.join(job.out, TRAINING_FOLDER), STATE_FILE)
    resume = files.read_bytes(path) if files.exists(path) else None

    def keep(metrics: dict[str, float], state: bytes | None) -> None:
        if state is not None:
            files.write_bytes(path, state)
        if report is not None:
            report(metrics, state)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return loop(job, Worker(0, 1, device), keep, resume)


def _train_on_ray(job: Job, workers: int, use_gpu: bool) -> bytes:
    import pyarrow.fs
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    location = files.locate(job.out)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(
            # The same name in the same folder resumes: the folder belongs to one spec.
            name=TRAINING_FOLDER,
            storage_path=location.path,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(location.fs)),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        raise DistillKacError(f"{job.out}: training failed: {innermost(error)}") from error
    if result.checkpoint is None:
        raise DistillKacError(f"{job.out}: training ended without a checkpoint")
    with result.checkpoint.as_directory() as folder:
        return Path(folder, STATE_FILE).read_bytes()


def innermost(error: BaseException) -> str:
    """The line of an error that says what went wrong, out of the layers that Ray wraps around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _ray_worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    job: Job = config["job"]
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

    def report(metrics: dict[str, float], state: bytes | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if state is not None and worker.rank == 0:
                Path(folder, STATE_FILE).write_bytes(state)
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint)

    latest = ray.train.get_checkpoint()
    resume = None
    if latest is not None:
        with latest.as_directory() as folder:
            resume = Path(folder, STATE_FILE).read_bytes()
    loop(job, worker, report, resume)


def loop(job: Job, worker: Worker, report: Report, resume: bytes | None) -> bytes:
    """Train from ``resume`` (or the start) to the last update; returns the final state.

    Raises:
        DistillKacError: the loss is not finite.
    """
    options = job.task.optimizer
    network, loss_of = job.task.build(worker)
    network.to(worker.device).train()
    ema = AveragedModel(network, multi_avg_fn=_warmed_average(options.ema_decay))
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=options.learning_rate,
        betas=(0.9, options.beta2),
        weight_decay=options.weight_decay,
        fused=True,
    )
    first = 0
    if resume is not None:
        state = _load_state(resume)
        network.load_state_dict(state["network"])
        ema.module.load_state_dict(state["ema"])
        ema.n_averaged.fill_(state["update"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["update"]
    model = _data_parallel(network, worker)
    bar = _progress_bar(job.title, first, options.updates, worker)
    window_start, losses = time.perf_counter(), []
    last_saved = b""
    for update in range(first, options.updates):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * learning_rate_factor(update, options)
        loss = loss_of(model, update)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), options.max_gradient_norm)
        optimizer.step()
        ema.update_parameters(network)
        losses.append(loss.detach())
        done = update + 1
        is_last = done == options.updates
        if done % LOG_UPDATES == 0 or is_last:
            metrics = _metrics(losses, window_start, optimizer, options)
            _check_finite(job, metrics["loss"], done)
            bar.update(len(losses))
            window_start, losses = time.perf_counter(), []
            if worker.rank == 0:
                job.run.metrics(metrics, step=done)
        if done % job.checkpoint_updates == 0 or is_last:
            _check_finite(job, float(loss.detach()), done)
            last_saved = _save_state(network, ema, optimizer, done)
            report({"update": float(done), "loss": float(loss.detach())}, last_saved)
    bar.close()
    return last_saved or resume or _save_state(network, ema, optimizer, first)


def learning_rate_factor(update: int, options: OptimizerConfig) -> float:
    """Linear warm-up, then half a cosine down to 0 at the last update."""
    if update < options.warmup_updates:
        return (update + 1) / options.warmup_updates
    share = (update - options.warmup_updates) / max(1, options.updates - options.warmup_updates)
    return 0.5 * (1 + math.cos(math.pi * share))


def _warmed_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """An exponential moving average whose decay grows with its age, so that the first weights are soon forgotten."""

    @torch.no_grad()
    def average(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        d = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, 1 - d)

    return average


def _data_parallel(network: nn.Module, worker: Worker) -> nn.Module:
    if worker.world_size == 1 or not dist.is_initialized():
        return network
    device_ids = [worker.device.index] if worker.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=device_ids)


def _metrics(
    losses: list[Tensor], window_start: float, optimizer: torch.optim.Optimizer, options: OptimizerConfig
) -> dict[str, float]:
    seconds = time.perf_counter() - window_start
    return {
        "loss": float(torch.stack(losses).mean()),
        "learning_rate": float(optimizer.param_groups[0]["lr"]),
        "samples_per_second": len(losses) * options.batch_size / seconds,
    }


def _check_finite(job: Job, loss: float, update: int) -> None:
    if not math.isfinite(loss):
        raise DistillKacError(
            f"{job.out}: expected a finite loss, found {loss} by update {update}: lower --optimizer.learning-rate"
        )


def _save_state(network: nn.Module, ema: AveragedModel, optimizer: torch.optim.Optimizer, update: int) -> bytes:
    sink = io.BytesIO()
    state = {
        "network": network.state_dict(),
        "ema": ema.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "update": update,
    }
    torch.save(state, sink)
    return sink.getvalue()


def _load_state(data: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def _progress_bar(title: str, first: int, total: int, worker: Worker) -> Any:
    import ray
    from ray.experimental import tqdm_ray
    from tqdm import tqdm

    if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        if worker.rank == 0:
            bar = tqdm_ray.tqdm(desc=title, total=total)
            bar.update(first)
            return bar
        return tqdm(disable=True)
    return tqdm(desc=title, initial=first, total=total, unit="update", mininterval=1.0)
