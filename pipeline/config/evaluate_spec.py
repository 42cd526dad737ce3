"""The options of evaluate."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from kac.precision import Precision
from kac.sampling import TEACHER_STEPS
from kac.solvers import Method
from kac.util.fingerprint import unhashed
from kac.util.path_options import input_path, output_path, reads
from pipeline.config.shared_options import (
    FEATURE_FILE,
    ActorOptions,
    Features,
)
from pipeline.config.spec import Spec


class EvaluateSpec(ActorOptions, Spec):
    """Compare a teacher and its students from the same noise."""

    stage = "evaluate"
    common = ("teacher", "students", "from_sweep", "runs", "samples", "features", "steps", "guidance")
    teacher: str | None = input_path(
        None, "the teacher's model folder; default, with `from_sweep` or `runs`: the students' teacher"
    )
    students: tuple[str, ...] = input_path((), "model folders of students, or folders of sweeps")
    from_sweep: str | None = input_path(None, "folder of a finished sweep: evaluate the students on its front again")
    runs: tuple[str, ...] = unhashed((), "ids of MLflow runs: evaluate their students")
    out: str = output_path(..., "folder to write: evaluation.json, samples.png, quality_by_nfe.png")
    samples: int = Field(5000, ge=2, description="samples per model")
    steps: tuple[PositiveInt, ...] = Field((1, 2, 4, 20), min_length=1, description="step counts of any-step students")
    guidance: tuple[float, ...] = Field(
        (), description="guidance scales of students that take any scale; default: those they learned"
    )
    solver: Method = Field("ab2", description="the teacher's solver")
    solver_steps: PositiveInt = Field(TEACHER_STEPS, description="the teacher's solver steps")
    precision: Precision = Precision()
    seed: int = Field(1_000_003, ge=0, lt=2**31, description="random seed of the noise; not that of the store")
    seeds: PositiveInt = Field(
        1, description="number of noise seeds, starting at `seed`; with several, the table shows means +- 95 %"
    )
    features: Features = Field(
        ("pixels", "classifier"),
        min_length=1,
        description="feature spaces: pixels; classifier (trained on the data's labels, cached); lite0, inception "
        "(trained on ImageNet; need an extra of this package); FILE.pt (TorchScript); package.module:factory",
        json_schema_extra=reads("file", FEATURE_FILE),
    )
    batch_size: PositiveInt = Field(500, description="samples per network call")

    @model_validator(mode="after")
    def _check_has_models(self) -> Self:
        if not self.teacher and not self.from_sweep and not self.runs:
            raise ValueError("`teacher` is required, unless `from_sweep` or `runs` is given.")
        return self
