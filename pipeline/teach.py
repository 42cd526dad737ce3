"""Teach: train a Kac-flow teacher by flow matching."""

from dataclasses import dataclass

import torch

from kac.checkpoint import CONFIG_FILE, ModelConfig, load_config, teacher_config
from kac.data import open_dataset
from kac.networks import VelocityNetwork, build_network
from kac.teacher import flow_matching_loss
from pipeline import cluster, outputs, tracking, training
from pipeline.config import OptimizerConfig, TeachSpec


@dataclass(frozen=True)
class TeachTask:
    """The flow-matching loss on a dataset."""

    spec: TeachSpec

    @property
    def optimizer(self) -> OptimizerConfig:
        """How it is trained."""
        return self.spec.optimizer

    def build(self, worker: training.Worker) -> training.Learner:
        """The teacher with its first weights."""
        spec, data = self.spec, open_dataset(self.spec.data)
        torch.manual_seed(spec.seed)
        network = build_network(spec.network, data.description.sample_shape, data.description.num_classes)
        path = spec.path.build()
        order = training.EpochOrder(spec.seed, len(data.train), spec.optimizer.batch_size)

        def losses(network: VelocityNetwork, update: int) -> dict[str, torch.Tensor]:
            images, labels = data.train.rows(order.batch(update)[worker.rank :: worker.world_size])
            loss = flow_matching_loss(
                network,
                path,
                images.to(worker.device, non_blocking=True),
                labels.to(worker.device, non_blocking=True),
                training.generator(spec.seed, update, worker),
                spec.label_dropout,
            )
            return {"flow_matching": loss}

        return training.NetworkLearner(network, losses, spec.optimizer, worker, spec.precision)


def teach(spec: TeachSpec, parent: tracking.TrackedRun | None = None) -> ModelConfig:
    """Train the teacher of ``spec`` and write its model folder; a complete one is returned as it is.

    Raises:
        DistillKacError: the folder belongs to another spec or cannot be written, or training diverged.
    """
    root = spec.data.root and cluster.absolute(spec.data.root)
    spec = spec.model_copy(
        update={"out": cluster.absolute(spec.out), "data": spec.data.model_copy(update={"root": root})}
    )
    data = open_dataset(spec.data).description
    content = {"data_sha256": data.sha256}
    if not outputs.begin(spec.out, spec, CONFIG_FILE, **content):
        print(f"teach: {spec.out} is complete: nothing to do", flush=True)
        return load_config(spec.out)
    workers, use_gpu = training.choose_workers(spec.workers, spec.gpu)
    fingerprint = spec.fingerprint(**content)
    inputs, name = {"data": data.sha256}, f"teach-{spec.data.kind}"
    with tracking.start_run(
        spec=spec, fingerprint=fingerprint, inputs=inputs, output=spec.out, parent=parent, name=name
    ) as run:
        job = training.Job(TeachTask(spec), "teach", spec.out, run, spec.checkpoint_updates)
        weights = training.train(job, workers, use_gpu)
        config = teacher_config(spec.network, spec.path, spec.data, fingerprint)
        config = outputs.write_model(spec.out, config, weights, run)
    print(f"teach: wrote {spec.out} (weights sha256 {config.weights_sha256[:12]})", flush=True)
    return config
