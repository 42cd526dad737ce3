"""The options of sample."""

from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveInt

from kac.precision import Precision
from kac.solvers import Method
from kac.util.path_options import input_path, output_path
from pipeline.config.shared_options import SEED
from pipeline.config.spec import Spec

ClassName = Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)]
"""A class, by its name or number."""


class SampleSpec(Spec):
    """Draw images from a teacher or a student."""

    stage = "sample"
    common = ("count", "labels", "guidance", "steps", "seed")
    model: str = input_path(..., "model folder")
    out: str = output_path(..., "file to write: .png (a sheet) or .npz (images in [-1, 1], labels)", kind="file")
    raw: bool = Field(False, description="write raw network outputs, neither clipped nor rounded to 8 bits; .npz only")
    count: PositiveInt = Field(100, description="number of images")
    labels: tuple[ClassName, ...] | None = Field(
        None,
        description="classes by name or number, repeated in turn: cat dog, or 3 5; a number is a name if classes have "
        "numeric names; default: the data's class frequencies",
    )
    guidance: float | None = Field(
        None, description="guidance scale of a teacher (default: 0), or of a student that takes any scale"
    )
    steps: PositiveInt | None = Field(
        None, description="a teacher's solver steps (default: 100), or an any-step student's steps (default: its own)"
    )
    solver: Method = Field("ab2", description="a teacher's solver")
    precision: Precision = Precision()
    seed: int = SEED
