"""The options of refinement."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt

from kac.losses.refinement.spaces import SpaceName
from kac.util.options import Kinded, kind_alone


class NoRefinementConfig(Kinded):
    """The student follows its teacher alone."""

    kind: Literal["none"] = Field("none", description="none: follow the teacher alone")


class DataRefinementConfig(Kinded):
    """Bring the student's images to the training images."""

    kind: Literal["data"] = Field("data", description="data: bring the student's images to the training images as well")
    anchor: NonNegativeFloat = Field(0.05, description="weight of the objective beside the energy distance")
    steps: tuple[PositiveInt, ...] = Field(
        (1, 1, 2, 4),
        min_length=1,
        description="step counts that an any-step student is sampled with, in turn; others are with their own",
    )
    spaces: tuple[SpaceName, ...] = Field(
        ("pixels",),
        min_length=1,
        description="where images are compared: pixels; pooled: means of 4x4 pixels; classifier: the layers of one "
        "that is trained for this and judges nothing; random: those of an untrained network, a new one every update",
    )
    real_images: PositiveInt = Field(
        512, description="training images an update, over all workers; they cost little, and the more the less noise"
    )
    class_weight: NonNegativeFloat = Field(
        0.5,
        description="distance between images of different classes, in mean distances between real images; an "
        "unconditional student is compared without classes",
    )


RefinementConfig = Annotated[
    NoRefinementConfig | DataRefinementConfig,
    Field(discriminator="kind", description="what a student learns beside its teacher, and the options of that"),
    BeforeValidator(kind_alone),
]
"""The config of any kind, as the command line, YAML and Python all take it."""
