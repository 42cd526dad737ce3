"""The options of distill."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from kac.losses import EndpointConfig, ObjectiveConfig
from kac.losses.refinement import NoRefinementConfig, RefinementConfig
from kac.precision import Precision
from kac.util.fingerprint import unhashed
from kac.util.path_options import input_path, output_path
from pipeline.config.spec import (
    DRY_RUN,
    DURING_TRAINING,
    RESOURCES,
    SEED,
    OptimizerConfig,
    RegisteredName,
    Spec,
    TrainingOptions,
    WorkerOptions,
)


class StudentOptions(TrainingOptions):
    """The options that distill and sweep share."""

    store: str = input_path(..., "endpoint store: path or s3:// URI")
    objective: ObjectiveConfig = EndpointConfig()
    refine: RefinementConfig = NoRefinementConfig()
    init: str = input_path(
        "teacher", "initial weights: teacher, or the model folder of another student", pattern="(?!teacher$).+"
    )
    teacher: str | None = input_path(None, "the teacher's model folder; default: the path that the rollout used")
    optimizer: OptimizerConfig = OptimizerConfig(updates=2000, learning_rate=3e-3, warmup_updates=50)
    precision: Precision = Precision()
    seed: int = SEED
    held_out_rows: NonNegativeInt = Field(
        0,
        description="trajectories to hold out per guidance scale, to validate the student against the teacher's images",
        json_schema_extra=dict(DURING_TRAINING),
    )
    memory_gib: PositiveFloat = unhashed(
        4.0, "memory per worker for store columns, in GiB; larger columns are streamed, in another order", RESOURCES
    )


class DistillSpec(WorkerOptions, StudentOptions, Spec):
    """Distill a student with a few macro steps from an endpoint store (Ray Train)."""

    stage = "distill"
    common = ("steps", "guidance", "init", "seed", "register", "dry_run")
    out: str = output_path(..., "model folder to write: path or s3:// URI")
    guidance: float | Literal["all"] = Field(
        0.0, description="guidance scale to learn; all: every scale in the store, which the network takes as an input"
    )
    steps: PositiveInt = Field(
        4, description="student steps, a divisor of the store's knots; an any-step student also supports other counts"
    )
    register: RegisteredName | None = unhashed(None, "register the student in MLflow under this name")
    dry_run: bool = DRY_RUN

    @model_validator(mode="after")
    def _check_refined_guidance(self) -> Self:
        if self.refine.kind == "data" and self.guidance == "all":
            raise ValueError(
                "`refine` data needs a single guidance scale, but `guidance` is all: refinement would pull every scale "
                "towards the same images. Give one scale."
            )
        return self
