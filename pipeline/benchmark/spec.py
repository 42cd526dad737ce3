"""The options of the benchmark."""

from typing import Annotated

import tyro
from pydantic import PositiveInt, field_validator, model_validator

from kac.data import DataConfig
from kac.networks import MLPConfig, NetworkConfig
from kac.util.fingerprint import unhashed
from kac.util.path_options import input_path, output_path
from pipeline.config import Spec

PARTS = {
    "peak-memory": "e",  # first, because it measures the memory of this process
    "rollout-speed": "a",
    "distill-speed": "b",
    "bytes-read": "c",
    "bytes-stored": "d",
    "process-speed": "f",
    "online-speed": "g",
    "store-scale": "h",
    "scheduling-rate": "i",
    "ledger-rate": "j",
}
"""The parts with their letters, in order of measurement. Each part is a module of this package."""

CALLS_PER_SHARD, MIN_SHARDS = 4, 5


class BenchmarkSpec(Spec):
    """Compare rollout, store and distillation with plain loops, as ratios (10 minutes on 2 CPUs)."""

    stage = "benchmark"
    only: tuple[str, ...] = unhashed(
        tuple(PARTS),
        f"parts to measure: {', '.join(f'{part} ({letter})' for part, letter in PARTS.items())}",
        min_length=1,
    )
    repeats: PositiveInt = unhashed(5, "number of times to measure both sides of each ratio")
    trajectories: PositiveInt = unhashed(
        8192, "trajectories per actor in rollout-speed; the store for the other parts has three times as many"
    )
    batch_size: PositiveInt = unhashed(256, "trajectories per network call, and samples per update")
    shards: PositiveInt = unhashed(
        2_000, "fake shards in store-scale, scheduling-rate and ledger-rate; the first two also measure a tenth"
    )
    teacher: str | None = input_path(None, "model folder of a teacher; default: an untrained `network` for `data`")
    network: NetworkConfig = MLPConfig()
    data: DataConfig = DataConfig()
    folder: str | None = unhashed(None, "scratch folder that all nodes can access; default: a local temporary folder")
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = output_path(
        None, "file to write all results to; - prints them instead of the table", kind="file"
    )

    @field_validator("only")
    @classmethod
    def _known(cls, chosen: tuple[str, ...]) -> tuple[str, ...]:
        unknown = set(chosen) - {*PARTS, *PARTS.values()}
        if unknown:
            raise ValueError(f"`only` has the unknown part {min(unknown)}. Choose from {', '.join(PARTS)}.")
        return tuple(part for part, letter in PARTS.items() if part in chosen or letter in chosen)

    @model_validator(mode="after")
    def _fits(self) -> "BenchmarkSpec":
        shard = CALLS_PER_SHARD * self.batch_size
        if self.trajectories % shard or self.trajectories < MIN_SHARDS * shard:
            raise ValueError(
                f"`trajectories` is {self.trajectories}, but must be a multiple of {shard} ({CALLS_PER_SHARD} times "
                f"`batch_size`) and at least {MIN_SHARDS * shard}."
            )
        return self
