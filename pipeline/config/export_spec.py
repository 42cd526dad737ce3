"""The options of export."""

from typing import Literal

from pydantic import Field

from kac.util.fingerprint import unhashed
from kac.util.path_options import input_path, output_path
from pipeline.config.spec import Spec


class ExportSpec(Spec):
    """Export a teacher or a student to diffusers, torch.export or ONNX."""

    stage = "export"
    common = ("format", "evaluation", "license", "push_to_hub")
    model: str = input_path(..., "model folder")
    out: str = output_path(..., "folder to write")
    format: Literal["diffusers", "pt2", "onnx"] = Field(
        "diffusers",
        description="diffusers: a pipeline that samples; pt2 (torch.export) or onnx: only the velocity network",
    )
    evaluation: str | None = input_path(None, "folder of a finished evaluation, for the scores in the model card")
    license: str = Field("unknown", description="license in the model card, in the Hub's notation, such as apache-2.0")
    samples: int = Field(16, ge=0, description="images in the model card's picture; 0: no picture")
    push_to_hub: str | None = unhashed(
        None, "upload to this repository of the Hugging Face Hub, OWNER/NAME", pattern=r"^[\w.-]+/[\w.-]+$"
    )
