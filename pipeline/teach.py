"""Train a Kac-flow teacher by flow matching."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kac.conditioning import known_classes, learned_conditioning
from kac.data import DataDescription, Dataset, open_dataset
from kac.losses import LossTerms
from kac.losses.flow_matching import drop_labels, flip, flow_matching_loss, stratified_times
from kac.model import CONFIG_FILE, GUIDE_PREFIX, ModelConfig, load_model, main_weights, teacher_config
from kac.networks import NetworkModule, VelocityNetwork, build_network, load_weights
from kac.networks.cost import network_cost, training_memory
from kac.precision import Precision
from kac.util.errors import ArgumentError
from kac.util.log import log
from pipeline import decode, outputs, tracking, training
from pipeline.cluster import connection as cluster
from pipeline.cluster import storage
from pipeline.config import OptimizerConfig, TeachSpec
from pipeline.training.batches import EpochOrder, prefetched, seed_dropout, slot_generator, update_generator


def teach(
    spec: TeachSpec,
    parent: tracking.TrackedRun | None = None,
    on_report: training.OnReport | None = None,
    *,
    is_trial: bool = False,
) -> ModelConfig | None:
    """Train a teacher and write its model folder. A complete folder stays unchanged.

    Args:
        parent: the run of the sweep or demo that this teacher is part of.
        on_report: called with the metrics of validations and checkpoints.
        is_trial: whether a sweep trains this teacher. If so, log no lines, because the sweep logs its own lines.

    Returns:
        The teacher's config, or None after a dry run.

    Raises:
        DistillKacError: the data is missing or damaged, the folder belongs to another spec or cannot be written, or
            the training diverged.
    """
    spec = _absolute(spec)
    paths = spec.data.paths()
    storage.check_shared(
        {"`out`": spec.out, "`init`": spec.init, **paths, **storage.cache_of(any(paths.values()))},
        is_spread=lambda: bool(training.choose_workers(spec).workers),
        writes_to_mlflow=spec.out,
    )
    spec = resolve_spec(spec)
    data = open_dataset(spec.data).description if is_trial else decode.open_described("teach", spec.data)
    content = {"data_sha256": data.sha256}
    if spec.init is not None:
        content["init_sha256"] = _init_sha256(spec, spec.init, data)
    network = network_cost(spec.network, data.sample_shape, data.num_classes)
    cost = training.describe_cost(spec.optimizer, network, data.train)
    if spec.dry_run:
        memory = training_memory(spec.network, data.sample_shape, data.num_classes)
        log.info(f"teach: {cost}\nteach: each worker needs {memory} of a pass, besides libraries")
        return None
    if not outputs.begin(spec.out, spec, CONFIG_FILE, **content):
        return outputs.complete_model(spec.stage, spec.out)
    group = training.choose_workers(spec)
    training.await_workers("teach", spec.optimizer, group)
    if not is_trial:
        log.info(f"teach: {cost}\nteach: {group}, {spec.precision.resolved(group.on_gpu)}")
    with outputs.teacher_run(spec, data, content, parent, is_trial) as run:
        conditioning = learned_conditioning(spec.network, spec.label_dropout)
        config = teacher_config(spec.network, spec.path, spec.data, spec.fingerprint(**content), conditioning)
        config = config.model_copy(update={"has_guide": spec.guide_updates is not None})
        config = training.train_model(spec, TeachTask(spec), "teach", config, run, group, on_report)
    if is_trial:
        return config
    unconditional = "" if known_classes(config) else "; unconditional: every stage samples it without class labels"
    log.info(f"teach: wrote {spec.out} (weights sha256 {config.weights_sha256[:12]}){unconditional}")
    return config


def resolve_spec(spec: TeachSpec) -> TeachSpec:
    """Return the spec with absolute paths and a settled precision."""
    spec = _absolute(spec)
    return spec.settled(lambda: training.choose_workers(spec).on_gpu)


def _absolute(spec: TeachSpec) -> TeachSpec:
    return cluster.absolute_paths(spec, "out", "init", "data.root", "data.autoencoder")


def _init_sha256(spec: TeachSpec, init: str, data: DataDescription) -> str:
    """Return the hash of the initial weights.

    Raises:
        CheckpointError: the model folder is missing or damaged.
        ArgumentError: the model is not a teacher, or its network or shapes differ from the spec's.
    """
    first = load_model(init).config
    if first.kind != "teacher":
        raise ArgumentError(f"`init` {init} is a student. Give a teacher.")
    other = {**first.network.model_dump(), "sample_shape": first.sample_shape, "num_classes": first.num_classes}
    own = {**spec.network.model_dump(), "sample_shape": data.sample_shape, "num_classes": data.num_classes}
    differing = [name for name in own if other.get(name) != own[name]]
    if differing:
        name = differing[0]
        raise ArgumentError(
            f"`init` {init} has {name} {other.get(name)}, but this teacher needs {own[name]}. Give a teacher with the "
            "same network options, image size and number of classes."
        )
    return first.weights_sha256


@dataclass(frozen=True)
class TeachTask:
    """Minimise the flow-matching loss on a dataset."""

    spec: TeachSpec

    def build(self, worker: training.Worker) -> training.Learner:
        """Return a learner for a teacher with initial weights."""
        spec, data = self.spec, open_dataset(self.spec.data)
        torch.manual_seed(spec.seed)
        path, samples = spec.path.build(), (data.description.sample_shape, data.description.num_classes)
        network = build_network(spec.network, *samples, path)
        if spec.init is not None:
            load_weights(network, main_weights(load_model(spec.init).network))
        batch = prefetched(_batches(spec, data), worker.device)

        def losses(network: VelocityNetwork, micro: training.MicroBatch) -> LossTerms:
            seed_dropout(spec.seed, micro)
            x_0, t, label = batch(micro)
            noise = slot_generator(spec.seed, micro)
            return LossTerms({"flow_matching": flow_matching_loss(network, path, x_0, t, label, noise)})

        return TeacherLearner(network, losses, spec.optimizer, worker, spec.precision, spec.guide_updates)


class TeacherLearner(training.Learner):
    """A learner that keeps a copy of the averaged weights after ``guide_updates`` updates, as the teacher's guide."""

    def __init__(
        self,
        network: NetworkModule,
        losses: training.Losses,
        options: OptimizerConfig,
        worker: training.Worker,
        precision: Precision,
        guide_updates: int | None,
    ) -> None:
        super().__init__(network, losses, options, worker, precision)
        self.guide_updates, self.guide = guide_updates, dict[str, Tensor]()

    def update(self, number: int) -> LossTerms:
        """Perform update ``number``, as every learner does, and copy the weights after update ``guide_updates``."""
        terms = super().update(number)
        if number + 1 == self.guide_updates:
            self.guide = {f"{GUIDE_PREFIX}{name}": w.clone() for name, w in self.averaged().state_dict().items()}
        return terms

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, including the guide."""
        return {**super().state_dict(), training.GUIDE: self.guide}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state. Older versions wrote states without a guide."""
        super().load_state_dict(state)
        self.guide = state.get(training.GUIDE, {})


def _batches(spec: TeachSpec, data: Dataset) -> Callable[[training.MicroBatch], tuple[Tensor, ...]]:
    """Return a function that reads the rows of a micro-batch and returns the inputs of the loss: x_0, t, label."""
    size, num_classes = spec.optimizer.batch_size, data.description.num_classes
    order = EpochOrder(spec.seed, len(data.train), size)

    def batch(micro: training.MicroBatch) -> tuple[Tensor, ...]:
        # Random numbers are drawn for the whole batch, so they do not depend on how the batch is split.
        draws = update_generator(spec.seed, micro.update)
        t, drop_coin, flip_coin = stratified_times(size, draws), *torch.rand(2, size, generator=draws)
        images, label = data.train.rows(micro.share(order.batch(micro.update)))
        label = drop_labels(label, micro.share(drop_coin) < spec.label_dropout, num_classes)
        if spec.data.horizontal_flip:
            images = flip(images, micro.share(flip_coin) < 0.5)
        return images, micro.share(t), label

    return batch
