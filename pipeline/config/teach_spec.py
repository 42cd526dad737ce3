"""The options of teach and convert, which make teachers."""

from typing import Self

from pydantic import Field, PositiveInt, SerializeAsAny, model_validator

from kac.data import DataConfig
from kac.networks import MLPConfig, UNetConfig
from kac.networks.network_kinds import NetworkChoice, path_with_limit
from kac.path import FORMER_DEFAULTS, PathConfig
from kac.precision import Precision
from kac.util.path_options import input_path, output_path
from pipeline.config.spec import DRY_RUN, SEED, OptimizerConfig, Spec, TrainingOptions, WorkerOptions

PATH = Field(PathConfig(), json_schema_extra={"neutral": {**PathConfig().model_dump(), **FORMER_DEFAULTS}})


class TeacherOptions(TrainingOptions):
    """The options that teach and sweeps of teachers share."""

    data: DataConfig = DataConfig()
    path: PathConfig = PATH
    network: NetworkChoice = MLPConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = Precision()
    label_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of labels to drop; guidance by the null label needs 0 < share < 1; 1: unconditional teacher",
    )
    guide_updates: PositiveInt | None = Field(
        None,
        description="keep the averaged weights after this many updates as a guide; guidance then compares the teacher "
        "with its guide instead of the null label (autoguidance); default: no guide",
    )
    seed: int = SEED


class TeachSpec(TeacherOptions, WorkerOptions, Spec):
    """Train a Kac-flow teacher on a dataset (flow matching, Ray Train)."""

    stage = "teach"
    common = ("init", "label_dropout", "seed", "dry_run")
    out: str = output_path(..., "model folder to write: path or s3:// URI")
    init: str | None = input_path(
        None, "initial weights: the model folder of another teacher with the same network; default: random"
    )
    dry_run: bool = DRY_RUN

    @model_validator(mode="after")
    def _check_guide(self) -> Self:
        if self.guide_updates is not None and self.guide_updates >= self.optimizer.updates:
            raise ValueError(
                f"`guide_updates` is {self.guide_updates}, but must be below `optimizer.updates` "
                f"{self.optimizer.updates}, because a guide is weaker than the teacher. A tenth to a fifth of the "
                "updates works well."
            )
        return self

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        _check_options(self.network, self.path, self.data)
        if self.label_dropout and not self.network.has_null_label:
            raise ValueError(
                f"`label_dropout` is {self.label_dropout}, but this network has no null label. "
                "Set `label_dropout` to 0."
            )
        return self


class ConvertSpec(Spec):
    """Make a teacher from existing weights: a model of diffusers, OpenAI's U-Net, or any module."""

    stage = "convert"
    common = ("key",)
    checkpoint: str = input_path(
        ...,
        "folder of a diffusers pipeline or model, or a .safetensors or torch.save file; path or s3:// URI",
        kind="any",
    )
    out: str = output_path(..., "model folder to write: path or s3:// URI")
    data: DataConfig
    path: PathConfig = PATH
    network: SerializeAsAny[NetworkChoice] = UNetConfig(
        channels=(128, 256, 256, 256), attention=(16,), head_channels=64, time_scale=1.0
    )
    key: str | None = Field(
        None,
        description="prefix of the weights' names in the file, such as ema_model; default: the only weights that fit, "
        "or their averaged version",
    )

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        _check_options(self.network, self.path, self.data)
        return self


def _check_options(network: NetworkChoice, path: PathConfig, data: DataConfig) -> None:
    if network.bounded:
        path_with_limit(path.build())
        if data.autoencoder:
            raise ValueError("`network.bounded` needs data in [-1, 1], but the data are latents. Remove it.")
    if network.conditions:
        raise ValueError("`network.conditions` must be empty, because a teacher takes only a time and a label.")
