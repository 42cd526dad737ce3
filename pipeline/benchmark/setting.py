"""What the parts share: a teacher, rollouts on Ray, and a store."""

from dataclasses import dataclass
from typing import Any

import ray
import torch

from kac import files
from kac.checkpoint import ModelConfig, load_config, save_model
from kac.data import open_dataset
from kac.networks import build_network
from kac.path import PathConfig
from pipeline import cluster, store
from pipeline.benchmark.spec import CALLS_A_SHARD, BenchmarkSpec
from pipeline.config import RolloutSpec
from pipeline.rollout import Outcome, compute_shards, make_plan, seal
from pipeline.store.layout import MANIFEST

ACTOR_START_SECONDS = 600
STORE_FACTOR = 3
STUDENT_STEPS = 4


@dataclass(frozen=True)
class Setting:
    """A benchmark at work."""

    spec: BenchmarkSpec
    folder: str
    teacher: str

    def rollout_spec(self, name: str, **options: Any) -> RolloutSpec:
        """A rollout into the store ``name`` of this run; shards of some network calls unless told otherwise."""
        size = self.spec.batch_size
        shard_size = CALLS_A_SHARD * size
        values = {"batch_size": size, "shard_size": shard_size, "trajectories": self.spec.trajectories, **options}
        return RolloutSpec(teacher=self.teacher, store=files.join(self.folder, name), **values)

    def store(self) -> store.Store:
        """The store of ``STORE_FACTOR`` times the trajectories; made once.

        Shards of the default size, and one solver step a knot: how the rows came about does not matter to their
        readers.
        """
        trajectories, shard_size = STORE_FACTOR * self.spec.trajectories, RolloutSpec.model_fields["shard_size"].default
        spec = self.rollout_spec("store", trajectories=trajectories, solver_steps=20, shard_size=shard_size)
        if not files.exists(files.join(spec.store, MANIFEST)):
            plan = make_plan(spec)
            seal(spec, plan, compute_shards(spec, plan))
        return store.open(spec.store)


def make_setting(spec: BenchmarkSpec, folder: str) -> Setting:
    """Find or make the teacher.

    Raises:
        CheckpointError: ``--teacher`` is no model folder.
    """
    if spec.teacher is not None:
        teacher = cluster.absolute(spec.teacher)
        load_config(teacher)
    else:
        teacher = files.join(folder, "teacher")
        save_untrained(teacher, spec)
    return Setting(spec, folder, teacher)


def save_untrained(path: str, spec: BenchmarkSpec) -> ModelConfig:
    """A teacher as slow as a trained one. Its last layer, which starts at 0, is drawn: a flow that stands still would
    store the same numbers in every knot."""
    data = open_dataset(spec.data).description
    torch.manual_seed(0)
    network = build_network(spec.network, data.sample_shape, data.num_classes)
    for parameter in network.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    config = ModelConfig(
        kind="teacher",
        network=spec.network,
        path=PathConfig(),
        data=spec.data,
        data_sha256=data.sha256,
        sample_shape=data.sample_shape,
        num_classes=data.num_classes,
        class_frequencies=data.class_frequencies,
    )
    return save_model(path, config, network.state_dict())


def compute_unsealed(spec: RolloutSpec) -> list[Outcome]:
    """The shards of a new store, as they were finished, by actors that are all up before the first of them begins."""
    context = ray.data.DataContext.get_current()
    before = context.wait_for_min_actors_s
    context.wait_for_min_actors_s = ACTOR_START_SECONDS
    try:
        return sorted(compute_shards(spec, make_plan(spec)), key=lambda outcome: outcome.finished)
    finally:
        context.wait_for_min_actors_s = before
