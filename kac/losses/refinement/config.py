"""Options of refinement."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt

from kac.losses.refinement.loss import DistanceName
from kac.losses.refinement.spaces import SpaceName
from kac.util.options import Kinded, expand_kind


class NoRefinementConfig(Kinded):
    """No refinement."""

    kind: Literal["none"] = Field("none", description="none: only imitate the teacher")


class DataRefinementConfig(Kinded):
    """Refinement on the training images."""

    kind: Literal["data"] = Field("data", description="data: also move student images towards the training images")
    anchor: NonNegativeFloat = Field(0.05, description="weight of the objective relative to the distance")
    distance: DistanceName = Field("energy", description="distance between student and training images")
    steps: tuple[PositiveInt, ...] = Field(
        (1, 1, 2, 4),
        min_length=1,
        description="step counts for sampling an any-step student, in turn; other students use their own",
    )
    spaces: tuple[SpaceName, ...] = Field(
        ("pixels",),
        min_length=1,
        description="feature spaces for comparing images: pixels; pooled: averages of 4x4 pixels; "
        "classifier: layers of a classifier not used in evaluation; random: layers of a random network, new per update",
    )
    real_images: PositiveInt = Field(
        512, description="training images per update, over all workers; a larger set costs little and reduces noise"
    )
    class_weight: NonNegativeFloat = Field(
        0.5,
        description="distance between classes, relative to the mean distance between training images; "
        "unused for unconditional students",
    )


RefinementConfig = Annotated[
    NoRefinementConfig | DataRefinementConfig,
    Field(discriminator="kind", description="training beyond the teacher"),
    BeforeValidator(expand_kind),
]
"""The config of any refinement. The string "data" is short for its default config."""
