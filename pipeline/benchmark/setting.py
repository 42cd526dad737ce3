"""The teacher, the rollouts on Ray and the store that all parts of the benchmark share."""

from dataclasses import dataclass
from typing import Any

import ray
import torch

from kac.model import load_config, save_model, teacher_config
from kac.networks import build_network
from kac.path import PathConfig
from kac.util import files
from pipeline import store
from pipeline.benchmark.spec import CALLS_PER_SHARD, BenchmarkSpec
from pipeline.cluster import connection as cluster
from pipeline.config import RolloutSpec
from pipeline.rollout import ShardOutcome, compute_shards, make_plan, seal

ACTOR_START_SECONDS = 600
STORE_FACTOR = 3
STUDENT_STEPS = 4


@dataclass(frozen=True)
class Setting:
    """The options, scratch folder and teacher of a benchmark."""

    spec: BenchmarkSpec
    folder: str
    teacher: str

    def rollout_spec(self, name: str, **options: Any) -> RolloutSpec:
        """The spec of a rollout into the store ``name`` in the scratch folder; ``options`` override the defaults."""
        size = {"trajectories": self.spec.trajectories, "shard_size": CALLS_PER_SHARD * self.spec.batch_size}
        place = {"teacher": self.teacher, "store": files.join(self.folder, name)}
        return RolloutSpec(**place, batch_size=self.spec.batch_size, **{**size, **options})

    def store(self) -> store.Store:
        """The store of the reading and training parts, made once.

        It has ``STORE_FACTOR`` times the trajectories, in shards of the default size. One solver step per knot is
        enough, because the values do not affect the reading speed.
        """
        shard_size = RolloutSpec.model_fields["shard_size"].default
        size = {"trajectories": STORE_FACTOR * self.spec.trajectories, "shard_size": shard_size}
        spec = self.rollout_spec("store", solver_steps=20, **size)
        plan = make_plan(spec)
        if not plan.is_done:
            seal(spec, plan, compute_shards(spec, plan))
        return store.open(spec.store)


def make_setting(spec: BenchmarkSpec, folder: str) -> Setting:
    """Load or make the teacher and return the setting.

    Raises:
        CheckpointError: ``spec.teacher`` is not a model folder.
    """
    teacher = cluster.absolute(spec.teacher) if spec.teacher is not None else files.join(folder, "teacher")
    if spec.teacher is None:
        save_untrained(teacher, spec)
    load_config(teacher)
    return Setting(spec, folder, teacher)


def save_untrained(path: str, spec: BenchmarkSpec) -> None:
    """Write an untrained teacher, which is as fast as a trained one.

    All-zero parameters, such as the last layer, get random values. Otherwise all knots would be equal.
    """
    config = teacher_config(spec.network, PathConfig(), spec.data)
    torch.manual_seed(0)
    network = build_network(config.network, config.sample_shape, config.num_classes)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    save_model(path, config, network.state_dict())


def compute_unsealed(spec: RolloutSpec) -> list[ShardOutcome]:
    """Compute the shards of a new store after all actors have started. Return the outcomes in order of completion."""
    context = ray.data.DataContext.get_current()
    before = context.wait_for_min_actors_s
    context.wait_for_min_actors_s = ACTOR_START_SECONDS
    try:
        return sorted(compute_shards(spec, make_plan(spec)), key=lambda outcome: outcome.finished)
    finally:
        context.wait_for_min_actors_s = before
