"""Small teachers and stores for tests, made without training or Ray."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from kac.data import DataConfig
from kac.model import save_model, teacher_config
from kac.networks import Conditioning, MLPConfig, build_network
from kac.path import PathConfig
from pipeline.config import RolloutSpec
from pipeline.rollout import Plan, compute_shards, make_plan, rollout
from pipeline.store.layout import Shard
from pipeline.store.manifest import Manifest
from pipeline.store.shards import Receipt


def make_teacher(
    path: str | Path,
    data: str | DataConfig = "moons",
    seed: int = 0,
    path_config: PathConfig | None = None,
    conditioning: Conditioning = "classes_and_null",
) -> str:
    """Write the model folder of an untrained teacher whose nonzero velocity differs between classes.

    The velocity of an unconditional teacher is NaN for every class and finite for the null label.
    """
    data = DataConfig(kind=data) if isinstance(data, str) else data
    config = teacher_config(MLPConfig(width=8, depth=1), path_config or PathConfig(), data, conditioning=conditioning)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(config.network, config.sample_shape, config.num_classes)
        # The last layer starts at zero, which would make the velocity zero.
        torch.nn.init.normal_(network.leave[1].weight, std=0.5)
    if conditioning == "none":
        network.label.weight.data[: config.num_classes] = torch.nan
    save_model(str(path), config, network.state_dict())
    return str(path)


def make_spec(path: str | Path, teacher: str, **options: Any) -> RolloutSpec:
    """Return a spec for this process: 100 trajectories with 4 knots, in three shards of 32 and one of 4."""
    defaults: dict[str, Any] = {"trajectories": 100, "knots": 4, "solver_steps": 8, "shard_size": 32, "actors": 0}
    return RolloutSpec(store=str(path), teacher=teacher, **{**defaults, **options})


def plan_store(spec: RolloutSpec) -> Plan:
    """Return the plan of a rollout."""
    return make_plan(spec)


def publish_shards(spec: RolloutSpec, plan: Plan) -> list[Receipt]:
    """Compute and publish the shards of ``plan.todo``."""
    return [outcome.receipt for outcome in compute_shards(spec, plan)]


def run_rollout(spec: RolloutSpec, is_sealed: bool = True) -> Manifest | None:
    """Run a rollout in this process. Unless ``is_sealed``, stop before writing the manifest."""
    spec = spec.model_copy(update={"actors": 0})
    if is_sealed:
        return rollout(spec)
    compute_shards(spec, make_plan(spec))
    return None


def make_store(path: str | Path, teacher: str, **options: Any) -> Manifest:
    """Make a finished store. The options are those of ``make_spec``."""
    return rollout(make_spec(path, teacher, **options))


def copy_store(store: str | Path, to: str | Path) -> Path:
    """Copy a store, for a test that damages it."""
    return Path(shutil.copytree(store, to))


def shard_file(store: str | Path, index: int, guidance: float = 0.0) -> Path:
    """Return the file of a shard."""
    return Path(store) / Shard(guidance, index, 0, 0).name


def last_value(path: Path, column: str) -> int:
    """Return the position of the last byte of a column in the file of a shard."""
    row_group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = [row_group.column(i) for i in range(row_group.num_columns)]
    (chunk,) = (chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    return int((chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1)


def flip(path: Path, position: int, mask: int = 1) -> None:
    """Flip bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(bytes(data))
