"""Teach: train a Kac-flow teacher by flow matching."""

from dataclasses import dataclass

import torch
from torch import nn

from kac.checkpoint import CONFIG_FILE, ModelConfig, load_config, save_model
from kac.data import Dataset, load_dataset
from kac.networks import build_network
from kac.teacher import flow_matching_loss
from pipeline import cluster, outputs, tracking, training
from pipeline.config import OptimizerConfig, TeachSpec, fingerprint


@dataclass(frozen=True)
class TeachTask:
    """The flow-matching loss on a dataset."""

    spec: TeachSpec

    @property
    def optimizer(self) -> OptimizerConfig:
        """How it is trained."""
        return self.spec.optimizer

    def build(self, worker: training.Worker) -> tuple[nn.Module, training.Loss]:
        """The network with its first weights, and its loss."""
        spec, data = self.spec, load_dataset(self.spec.data)
        torch.manual_seed(spec.seed)
        network = build_network(spec.network, data.sample_shape, data.num_classes)
        images, labels = data.images.to(worker.device), data.labels.to(worker.device)
        path = spec.path.build()
        batch_size = spec.optimizer.batch_size

        def loss(model: nn.Module, update: int) -> torch.Tensor:
            rows = epoch_rows(spec.seed, update, batch_size, len(labels))[worker.rank :: worker.world_size]
            rows = rows.to(worker.device)
            generator = training.generator(spec.seed, update, worker)
            return flow_matching_loss(
                model, network.null_label, path, images[rows], labels[rows], generator, spec.label_dropout
            )

        return network, loss


def epoch_rows(seed: int, update: int, batch_size: int, count: int) -> torch.Tensor:
    """The rows of an update's batch out of endless shuffled epochs over ``count`` rows: [batch_size], int64."""
    first, last = update * batch_size, (update + 1) * batch_size
    epochs = range(first // count, (last - 1) // count + 1)
    order = torch.cat([torch.randperm(count, generator=training.seeded(seed, epoch)) for epoch in epochs])
    return order[first - epochs.start * count :][:batch_size]


def data_fingerprint(data: Dataset) -> str:
    """The name of a dataset's content."""
    import hashlib

    digest = hashlib.sha256(data.images.numpy().tobytes() + data.labels.numpy().tobytes()).hexdigest()
    return fingerprint({"images_and_labels": digest, "shape": data.sample_shape})


def teach(spec: TeachSpec, parent: tracking.TrackedRun | None = None) -> ModelConfig:
    """Train the teacher of ``spec`` and write its model folder; a complete one is returned as it is.

    Raises:
        DistillKacError: the folder belongs to another spec or cannot be written, or training diverged.
    """
    spec = spec.model_copy(update={"out": cluster.absolute(spec.out)})
    data = load_dataset(spec.data)
    content = {"data_sha256": data_fingerprint(data)}
    if outputs.claim(spec.out, spec, CONFIG_FILE, **content):
        print(f"teach: {spec.out} is complete: nothing to do", flush=True)
        return load_config(spec.out)
    workers, use_gpu = training.choose_workers(spec.workers, spec.gpu)
    name = spec.fingerprint(**content)
    with tracking.start_run(
        "teach", f"teach-{spec.data}", spec, name, {"data": content["data_sha256"]}, spec.out, parent
    ) as run:
        job = training.Job(TeachTask(spec), "teach", spec.out, run, spec.checkpoint_updates)
        weights = training.train(job, workers, use_gpu)
        network = build_network(spec.network, data.sample_shape, data.num_classes)
        config = ModelConfig(
            kind="teacher",
            network=spec.network,
            path=spec.path,
            data=spec.data,
            sample_shape=data.sample_shape,
            num_classes=data.num_classes,
            class_frequencies=data.class_frequencies,
            fingerprint=name,
        )
        config = save_model(spec.out, network, config, weights)
        run.tags({"distillkac.weights_sha256": config.weights_sha256, "distillkac.path": spec.out})
        training.finish(spec.out)
    print(f"teach: wrote {spec.out} (weights sha256 {config.weights_sha256[:12]})", flush=True)
    return config
