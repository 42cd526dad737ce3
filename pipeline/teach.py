"""Train a Kac-flow teacher by flow matching."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kac.conditioning import known_classes, learned_conditioning
from kac.data import Dataset, open_dataset
from kac.losses import LossTerms
from kac.losses.flow_matching import drop_labels, flip, flow_matching_loss, stratified_times
from kac.model import CONFIG_FILE, ModelConfig, load_config, teacher_config
from kac.networks import VelocityNetwork, build_network
from kac.util.log import log
from pipeline import decode, outputs, tracking, training
from pipeline.cluster import connection as cluster
from pipeline.cluster import storage
from pipeline.config import OptimizerConfig, TeachSpec


def teach(
    spec: TeachSpec, parent: tracking.TrackedRun | None = None, on_report: training.OnReport | None = None
) -> ModelConfig | None:
    """Train a teacher and write its model folder. A complete folder stays unchanged.

    Args:
        spec: the options.
        parent: the run of the demo that this teacher is part of.
        on_report: called with the metrics of validations and checkpoints.

    Returns:
        The teacher's config, or None after a dry run.

    Raises:
        DistillKacError: the data is missing or damaged, the folder belongs to another spec or cannot be written, or
            the training diverged.
    """
    spec = cluster.absolute_paths(spec, "out", "data.root")
    root = spec.data.root
    storage.check_shared(
        {"`out`": spec.out, "`data.root`": root, **storage.cache_of(root is not None)},
        is_spread=lambda: bool(training.choose_workers(spec).workers),
        writes_to_mlflow=spec.out,
    )
    spec = spec.settled(lambda: training.choose_workers(spec).on_gpu)
    data = decode.open_described("teach", spec.data)
    network = (spec.network, data.sample_shape, data.num_classes)
    cost = f"teach: {training.describe_cost(spec.optimizer, *network, data.train)}"
    if spec.dry_run:
        log.info(cost)
        return None
    content = {"data_sha256": data.sha256}
    if not outputs.begin(spec.out, spec, CONFIG_FILE, **content):
        log.info(f"teach: {spec.out} is complete: nothing to do")
        config = load_config(spec.out)
        if unfinished := outputs.reopen_run(spec.out, config):
            unfinished.end("FINISHED")
        return config
    group, fingerprint = training.choose_workers(spec), spec.fingerprint(**content)
    training.await_workers("teach", spec.optimizer, group)
    log.info(f"{cost}\nteach: {training.describe_workers(group, spec.precision)}")
    inputs, name = {"data": data.sha256}, f"teach-{spec.data.kind}"
    datasets = [tracking.Dataset(spec.data.kind, data.sha256, spec.data.origin)]
    with tracking.start_run(
        spec=spec,
        fingerprint=fingerprint,
        inputs=inputs,
        output=spec.out,
        parent=parent,
        name=name,
        datasets=datasets,
    ) as run:
        training.log_cost(run, *network)
        decode.log_data(run, data)
        conditioning = learned_conditioning(spec.network, spec.label_dropout)
        config = teacher_config(spec.network, spec.path, spec.data, fingerprint, conditioning)
        sheets = training.Sheets(spec.sample_updates, config, spec.precision)
        validation = training.Validation(spec.validation_updates, config, spec.optimizer, spec.precision)
        job = training.Job(
            TeachTask(spec),
            "teach",
            spec.out,
            run,
            spec.checkpoint_updates,
            sheets,
            validation,
            spec.checkpoint_seconds,
        )
        config = outputs.write_model(spec.out, config, training.train(job, group, on_report), run)
    unconditional = "" if known_classes(config) else "; unconditional: every stage samples it without class labels"
    log.info(f"teach: wrote {spec.out} (weights sha256 {config.weights_sha256[:12]}){unconditional}")
    return config


@dataclass(frozen=True)
class TeachTask:
    """Minimise the flow-matching loss on a dataset."""

    spec: TeachSpec

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer's options."""
        return self.spec.optimizer

    def build(self, worker: training.Worker) -> training.Learner:
        """Return a learner for a teacher with initial weights."""
        spec, data = self.spec, open_dataset(self.spec.data)
        torch.manual_seed(spec.seed)
        network = build_network(spec.network, data.description.sample_shape, data.description.num_classes)
        path, batch = spec.path.build(), training.prefetched(_Batches(spec, data), worker.device)

        def losses(network: VelocityNetwork, micro: training.MicroBatch) -> LossTerms:
            training.seed_dropout(spec.seed, micro)
            noise = training.slot_generator(spec.seed, micro)
            return LossTerms({"flow_matching": flow_matching_loss(network, path, *batch(micro), noise)})

        return training.NetworkLearner(network, losses, spec.optimizer, worker, spec.precision)


class TrainingBatch(NamedTuple):
    """The inputs of the loss."""

    x_0: Tensor  # [rows, *sample]
    t: Tensor  # [rows]
    label: Tensor  # [rows], some replaced by the null label


class _Batches:
    """Makes the micro-batches of a training run. Reads only the rows of each micro-batch, and keeps none of them."""

    def __init__(self, spec: TeachSpec, data: Dataset) -> None:
        self.spec, self.data = spec, data
        self.order = training.EpochOrder(spec.seed, len(data.train), spec.optimizer.batch_size)

    def __call__(self, micro: training.MicroBatch) -> TrainingBatch:
        """Draw random numbers for the whole batch and return the part of ``micro``: no split changes the batch."""
        spec, size = self.spec, self.spec.optimizer.batch_size
        draws = training.update_generator(spec.seed, micro.update)
        t, drop_coin, flip_coin = stratified_times(size, draws), *torch.rand(2, size, generator=draws)
        images, label = self.data.train.rows(micro.share(self.order.batch(micro.update)))
        label = drop_labels(label, micro.share(drop_coin) < spec.label_dropout, self.data.description.num_classes)
        if spec.data.horizontal_flip:
            images = flip(images, micro.share(flip_coin) < 0.5)
        return TrainingBatch(images, micro.share(t), label)
