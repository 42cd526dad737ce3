"""The options of teach."""

from typing import Self

from pydantic import Field, model_validator

from kac.data import DataConfig
from kac.networks import MLPConfig, NetworkConfig
from kac.path import PathConfig
from kac.precision import Precision
from kac.util.path_options import output_path
from pipeline.config.shared_options import (
    DRY_RUN,
    SEED,
    OptimizerConfig,
    TrainingOptions,
    WorkerOptions,
    check_teacher_network,
)
from pipeline.config.spec import Spec


class TeachSpec(TrainingOptions, WorkerOptions, Spec):
    """Train a Kac-flow teacher on a dataset (flow matching, Ray Train)."""

    stage = "teach"
    common = ("label_dropout", "seed", "dry_run")
    data: DataConfig = DataConfig()
    out: str = output_path(..., "model folder to write: path or s3:// URI")
    path: PathConfig = PathConfig()
    network: NetworkConfig = MLPConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = Precision()
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="fraction of labels dropped, for guidance; 1: unconditional teacher"
    )
    seed: int = SEED
    dry_run: bool = DRY_RUN

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        check_teacher_network(self.network)
        if self.label_dropout and not self.network.has_null_label:
            raise ValueError(
                f"`label_dropout` is {self.label_dropout}, but this network has no null label. "
                "Set `label_dropout` to 0."
            )
        return self
