"""Distill: train a student of a few macro steps on a store's endpoints."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from kac.checkpoint import CONFIG_FILE, Model, ModelConfig, load_config, load_model, save_model
from kac.errors import CheckpointError
from kac.student import endpoint_loss
from pipeline import cluster, outputs, store, tracking, training
from pipeline.config import DistillSpec, OptimizerConfig


@dataclass(frozen=True)
class DistillTask:
    """The endpoint loss on the intervals of a store."""

    spec: DistillSpec
    init: str

    @property
    def optimizer(self) -> OptimizerConfig:
        """How it is trained."""
        return self.spec.optimizer

    def build(self, worker: training.Worker) -> tuple[nn.Module, training.Loss]:
        """The network with its first weights, and its loss."""
        spec = self.spec
        network = load_model(self.init).network.requires_grad_(True)
        batches = None

        def loss(model: nn.Module, update: int) -> torch.Tensor:
            nonlocal batches
            if batches is None:
                batches = store.open(spec.store).interval_batches(
                    spec.optimizer.batch_size // worker.world_size,
                    spec.steps,
                    spec.guidance,
                    rank=worker.rank,
                    world_size=worker.world_size,
                    seed=spec.seed,
                    start_batch=update,
                    memory_bytes=int(spec.memory_gib * 2**30),
                )
            return endpoint_loss(model, *(part.to(worker.device) for part in next(batches)))

        return network, loss


def distill(spec: DistillSpec, parent: tracking.TrackedRun | None = None) -> ModelConfig:
    """Train the student of ``spec`` and write its model folder; a complete one is returned as it is.

    Raises:
        DistillKacError: the store, its guidance scale, the step count, the first weights or the folder do not fit.
    """
    spec = resolve(spec)
    plan = check(spec)
    if outputs.claim(spec.out, spec, CONFIG_FILE, **plan.content):
        print(f"distill: {spec.out} is complete: nothing to do", flush=True)
        return load_config(spec.out)
    workers, use_gpu = training.choose_workers(spec.workers, spec.gpu)
    with start_run(spec, plan, parent) as run:
        weights = training.train(job_of(spec, plan, run), workers, use_gpu)
        return write_student(spec, plan, weights, run)


@dataclass(frozen=True)
class DistillPlan:
    """What a spec comes to once its inputs have been looked at."""

    content: dict[str, str]  # fingerprints of the inputs: they are part of the student's own
    init: str
    init_config: ModelConfig


def resolve(spec: DistillSpec) -> DistillSpec:
    """The spec with paths that every process of the cluster understands."""
    paths = {name: getattr(spec, name) for name in ("store", "out", "teacher", "init")}
    absolute = {
        name: cluster.absolute(path)
        for name, path in paths.items()
        if path is not None and not (name == "init" and path == "teacher")
    }
    return spec.model_copy(update=absolute)


def check(spec: DistillSpec) -> DistillPlan:
    """Look at the inputs before any work.

    Raises:
        DistillKacError: the first thing that does not fit.
    """
    source = store.open(spec.store)
    source.check_steps(spec.steps)
    source.check_guidance(spec.guidance)
    assert source.manifest is not None
    init = spec.init if spec.init != "teacher" else (spec.teacher or source.manifest.teacher)
    model = load_model(init)
    _check_init(spec, source, init, model)
    content = {"store": source.manifest.fingerprint, "init_sha256": model.config.weights_sha256}
    held = [part.ids for part in source.manifest.contents if part.guidance == spec.guidance]
    return DistillPlan({**content, "sample_ids": str(list(held[0]))}, init, model.config)


def _check_init(spec: DistillSpec, source: store.Store, init: str, model: Model) -> None:
    wanted = source.spec.teacher_sha256
    config = model.config
    found = config.weights_sha256 if config.kind == "teacher" else config.teacher_sha256
    if found != wanted:
        raise CheckpointError(
            f"{init}: expected the store's teacher {wanted[:12]}... or a student of it, "
            f"found one of {str(found)[:12]}...: give the right --init or --teacher, "
            "or roll this teacher out into a store of its own"
        )
    if config.kind == "student" and config.guidance != spec.guidance:
        raise CheckpointError(
            f"{init}: expected a student of guidance {spec.guidance}, found one of {config.guidance}: "
            "choose another --init"
        )


def start_run(
    spec: DistillSpec, plan: DistillPlan, parent: tracking.TrackedRun | None
) -> AbstractContextManager[tracking.TrackedRun]:
    """The tracked run of a student."""
    name = f"distill-steps-{spec.steps}-guidance-{spec.guidance}"
    inputs = {
        "rollout": plan.content["store"],
        "teacher": plan.init_config.teacher_sha256 or plan.content["init_sha256"],
    }
    return tracking.start_run("distill", name, spec, spec.fingerprint(**plan.content), inputs, spec.out, parent)


def job_of(spec: DistillSpec, plan: DistillPlan, run: tracking.TrackedRun) -> training.Job:
    """The training job of a student."""
    title = f"distill {spec.steps} steps, guidance {spec.guidance:g}"
    return training.Job(DistillTask(spec, plan.init), title, spec.out, run, spec.checkpoint_updates)


def write_student(
    spec: DistillSpec, plan: DistillPlan, weights: dict[str, torch.Tensor], run: tracking.TrackedRun
) -> ModelConfig:
    """Write the model folder of a trained student."""
    base = plan.init_config
    config = base.model_copy(
        update={
            "kind": "student",
            "steps": spec.steps,
            "guidance": spec.guidance,
            "fingerprint": spec.fingerprint(**plan.content),
            "teacher_sha256": base.teacher_sha256 or base.weights_sha256,
            "store_fingerprint": plan.content["store"],
        }
    )
    config = save_model(spec.out, load_model(plan.init).network, config, weights)
    run.tags({"distillkac.weights_sha256": config.weights_sha256, "distillkac.path": spec.out})
    training.finish(spec.out)
    print(f"distill: wrote {spec.out} ({spec.steps} steps, guidance {spec.guidance:g})", flush=True)
    return config
