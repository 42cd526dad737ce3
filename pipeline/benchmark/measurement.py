"""The options of the benchmark, what its parts share (a teacher and a store), and their measurements."""

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from pydantic import PositiveInt, model_validator

from kac.data import DataConfig
from kac.model import load_config, save_model, teacher_config
from kac.networks import MLPConfig, NetworkConfig, build_network
from kac.path import PathConfig
from kac.util import files
from kac.util.fingerprint import unhashed
from kac.util.options import OptionStyle
from kac.util.path_options import input_path, output_path
from pipeline import store
from pipeline.cluster import connection as cluster
from pipeline.config import RolloutSpec, Spec
from pipeline.rollout import compute_shards, make_plan, seal

Part = Literal["peak-memory", "rollout-speed", "distill-speed", "bytes-read", "bytes-stored", "online-speed"]

CALLS_PER_SHARD, MIN_SHARDS = 4, 5
STORE_FACTOR = 3  # trajectories in the store / trajectories per actor

Value = TypeVar("Value")


class BenchmarkSpec(Spec):
    """Compare rollout, store and distillation with plain loops, as ratios (10 minutes on 2 CPUs)."""

    stage = "benchmark"
    only: tuple[Part, ...] = unhashed(get_args(Part), "parts to measure", min_length=1)
    repeats: PositiveInt = unhashed(5, "number of times to measure both sides of each ratio")
    trajectories: PositiveInt = unhashed(
        8192, "trajectories per actor in rollout-speed; the store for the other parts has three times as many"
    )
    batch_size: PositiveInt = unhashed(256, "trajectories per network call, and samples per update")
    teacher: str | None = input_path(None, "model folder of a teacher; default: an untrained `network` for `data`")
    network: NetworkConfig = MLPConfig()
    data: DataConfig = DataConfig()
    folder: str | None = unhashed(None, "scratch folder that all nodes can access; default: a local temporary folder")
    json_file: Annotated[str | None, OptionStyle(name="json")] = output_path(
        None, "file to write all results to; - prints them instead of the table", kind="file"
    )

    @model_validator(mode="after")
    def _fits(self) -> "BenchmarkSpec":
        shard = CALLS_PER_SHARD * self.batch_size
        if self.trajectories % shard or self.trajectories < MIN_SHARDS * shard:
            raise ValueError(
                f"`trajectories` is {self.trajectories}, but must be a multiple of {shard} ({CALLS_PER_SHARD} times "
                f"`batch_size`) and at least {MIN_SHARDS * shard}."
            )
        return self


@dataclass(frozen=True)
class Setting:
    """The options, scratch folder and teacher of a benchmark."""

    spec: BenchmarkSpec
    folder: str
    teacher: str

    def rollout_spec(self, name: str, **options: Any) -> RolloutSpec:
        """The spec of a rollout into the store ``name`` in the scratch folder; ``options`` override the defaults."""
        defaults = {
            "trajectories": self.spec.trajectories,
            "shard_size": CALLS_PER_SHARD * self.spec.batch_size,
            "batch_size": self.spec.batch_size,
        }
        return RolloutSpec(teacher=self.teacher, store=files.join(self.folder, name), **{**defaults, **options})

    def store(self) -> store.Store:
        """The store of the reading and training parts, made once, in shards of the default size."""
        shard_size = RolloutSpec.model_fields["shard_size"].default
        size = {"trajectories": STORE_FACTOR * self.spec.trajectories, "shard_size": shard_size}
        # One solver step per knot is enough, because the values do not affect the reading speed.
        spec = self.rollout_spec("store", solver_steps=20, **size)
        plan = make_plan(spec)
        if not plan.is_done:
            seal(spec, plan, compute_shards(spec, plan))
        return store.open(spec.store)


def make_setting(spec: BenchmarkSpec, folder: str) -> Setting:
    """Check the teacher, or write an untrained one, which is as fast as a trained one.

    Raises:
        CheckpointError: ``spec.teacher`` is not a model folder.
    """
    if spec.teacher is not None:
        load_config(cluster.absolute(spec.teacher))
        return Setting(spec, folder, cluster.absolute(spec.teacher))
    config = teacher_config(spec.network, PathConfig(), spec.data)
    torch.manual_seed(0)
    network = build_network(config.network, config.sample_shape, config.num_classes)
    # All-zero parameters, such as the last layer, get random values. Otherwise all knots would be equal.
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    teacher = files.join(folder, "teacher")
    save_model(teacher, config, network.state_dict())
    return Setting(spec, folder, teacher)


@dataclass(frozen=True)
class Measurement:
    """A quantity and optionally its reference, each measured once per turn."""

    what: str
    unit: str
    values: tuple[float, ...]
    against: tuple[float, ...] = ()
    bar: str | None = None  # limit for the median ratio, such as ">= 0.95"

    @property
    def ratios(self) -> tuple[float, ...]:
        """One ratio per turn; empty without a reference."""
        return tuple(a / b for a, b in zip(self.values, self.against, strict=True)) if self.against else ()

    @property
    def holds(self) -> bool | None:
        """Whether the median ratio meets the bar; None without a bar."""
        if self.bar is None:
            return None
        ratio, (sign, limit) = statistics.median(self.ratios), self.bar.split()
        return ratio >= float(limit) if sign == ">=" else ratio <= float(limit)

    def record(self) -> dict[str, Any]:
        """The measurement as plain values for JSON."""
        return {
            **dataclasses.asdict(self),
            "ratios": self.ratios,
            "median_ratio": statistics.median(self.ratios) if self.ratios else None,
            "min_ratio": min(self.ratios, default=None),
            "max_ratio": max(self.ratios, default=None),
            "holds": self.holds,
        }


def interleave(turns: int, *sides: Callable[[], Value]) -> list[tuple[Value, ...]]:
    """Call the sides alternately, A B A B ... Return one tuple of results per side."""
    rounds = [[side() for side in sides] for _ in range(turns)]
    return [tuple(values) for values in zip(*rounds, strict=True)]
