"""The options of the benchmark."""

from typing import Annotated, Literal

import tyro
from pydantic import PositiveInt, field_validator, model_validator

from kac.data import DataName
from kac.networks import NetworkConfig
from pipeline.config import Spec, how

Part = Literal["a", "b", "c", "d", "e", "f", "g"]

PARTS: dict[str, str] = {
    "a": "rollout speed",
    "b": "distillation from the store",
    "c": "bytes read",
    "d": "bytes stored",
    "e": "peak memory of a rollout",
    "f": "the process",
    "g": "distillation without a store",
}

CALLS_A_SHARD, MIN_SHARDS = 4, 5


class BenchmarkSpec(Spec):
    """Measure the rollout, the store and the distillation against plain loops, as ratios (10 minutes on 2 CPUs)."""

    only: tuple[Part, ...] = how(
        tuple(PARTS), "parts to measure: " + ", ".join(f"{part} {title}" for part, title in PARTS.items()), min_length=1
    )
    repeats: PositiveInt = how(5, "turns that both sides of a ratio take")
    trajectories: PositiveInt = how(
        8192, "trajectories an actor follows in a run of (a); three times as many are in the store of the other parts"
    )
    batch_size: PositiveInt = how(256, "trajectories a network call, and samples an update")
    teacher: str | None = how(None, "model folder of a teacher; default: an untrained one of --network for --data")
    network: NetworkConfig = NetworkConfig(width=192, depth=3)
    data: DataName = "digits"
    folder: str | None = how(None, "scratch folder that all nodes see; default: a temporary one on this machine")
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = how(
        None, "file to write all figures to; - prints them instead of the table"
    )

    @field_validator("only")
    @classmethod
    def _once_each(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple(dict.fromkeys(parts))

    @model_validator(mode="after")
    def _fits(self) -> "BenchmarkSpec":
        shard = CALLS_A_SHARD * self.batch_size
        if self.trajectories % shard or self.trajectories < MIN_SHARDS * shard:
            raise ValueError(
                f"--trajectories: expected a multiple of {CALLS_A_SHARD} x --batch-size {self.batch_size}, "
                f"{MIN_SHARDS * shard} at least, found {self.trajectories}"
            )
        return self
