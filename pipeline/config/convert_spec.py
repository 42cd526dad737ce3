"""The options of convert."""

from typing import Self

from pydantic import Field, model_validator

from kac.data import DataConfig
from kac.networks import NetworkConfig, UNetConfig
from kac.path import PathConfig
from kac.util.path_options import input_path, output_path
from pipeline.config.shared_options import check_teacher_network
from pipeline.config.spec import Spec


class ConvertSpec(Spec):
    """Make a teacher from existing weights: a U-Net of OpenAI or diffusers, or any module."""

    stage = "convert"
    common = ("key",)
    checkpoint: str = input_path(..., "weights: a .safetensors or torch.save file; path or s3:// URI", kind="any")
    out: str = output_path(..., "model folder to write: path or s3:// URI")
    data: DataConfig
    path: PathConfig = PathConfig()
    network: NetworkConfig = UNetConfig(
        channels=(128, 256, 256, 256), attention=(16,), head_channels=64, time_scale=1.0
    )
    key: str | None = Field(
        None,
        description="prefix of the weights in the file, such as ema_model; default: the only weights that fit, or "
        "their average",
    )

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        check_teacher_network(self.network)
        return self
