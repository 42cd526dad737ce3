"""The options of the benchmark."""

from typing import Annotated

import tyro
from pydantic import PositiveInt, field_validator, model_validator

from kac.data import DataConfig
from kac.networks import MLPConfig, NetworkConfig
from kac.util.fingerprint import unhashed
from kac.util.path_options import input_path, output_path
from pipeline.config.specs import Spec

PARTS = {
    "peak-memory": "e",  # first, while this process, whose memory is measured, has not yet worked
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
"""Each part, in the order in which they are measured, with its letter. A part is the module of its name."""

CALLS_A_SHARD, MIN_SHARDS = 4, 5


class BenchmarkSpec(Spec):
    """Measure the rollout, the store and the distillation against plain loops, as ratios (10 minutes on 2 CPUs)."""

    stage = "benchmark"
    only: tuple[str, ...] = unhashed(
        tuple(PARTS),
        f"parts to measure: {', '.join(f'{part} ({letter})' for part, letter in PARTS.items())}",
        min_length=1,
    )
    repeats: PositiveInt = unhashed(5, "turns that both sides of a ratio take")
    trajectories: PositiveInt = unhashed(
        8192, "trajectories an actor follows for rollout-speed; the store of the other parts has three times as many"
    )
    batch_size: PositiveInt = unhashed(256, "trajectories a network call, and samples an update")
    shards: PositiveInt = unhashed(
        2_000, "made-up shards for store-scale, scheduling-rate and ledger-rate; the first two also take a tenth"
    )
    teacher: str | None = input_path(
        None, "model folder of a teacher; default: an untrained one of `network` for `data`"
    )
    network: NetworkConfig = MLPConfig()
    data: DataConfig = DataConfig()
    folder: str | None = unhashed(None, "scratch folder that all nodes see; default: a temporary one on this machine")
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = output_path(
        None, "file to write all figures to; - prints them instead of the table", kind="file"
    )

    @field_validator("only")
    @classmethod
    def _known(cls, asked: tuple[str, ...]) -> tuple[str, ...]:
        unknown = set(asked) - {*PARTS, *PARTS.values()}
        if unknown:
            raise ValueError(f"`only`: expected parts of {', '.join(PARTS)}, found {min(unknown)}")
        return tuple(part for part, letter in PARTS.items() if part in asked or letter in asked)

    @model_validator(mode="after")
    def _fits(self) -> "BenchmarkSpec":
        shard = CALLS_A_SHARD * self.batch_size
        if self.trajectories % shard or self.trajectories < MIN_SHARDS * shard:
            raise ValueError(
                f"`trajectories`: expected a multiple of {CALLS_A_SHARD} x `batch_size` {self.batch_size}, "
                f"{MIN_SHARDS * shard} at least, found {self.trajectories}"
            )
        return self
