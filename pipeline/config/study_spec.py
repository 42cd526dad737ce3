"""The options of study."""

from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from kac.precision import Precision
from kac.util.fingerprint import unhashed
from kac.util.path_options import input_path, output_path
from pipeline.config.spec import Spec

Claim = Literal["stability", "speed", "solver", "guidance", "memorisation", "marginals", "plane", "all"]

CLAIMS: tuple[Claim, ...] = ("stability", "speed", "solver", "guidance", "memorisation", "marginals", "plane")


class StudySpec(Spec):
    """Test the claims of the papers on Kac flows, on a teacher, its store and its students."""

    stage = "study"
    common = ("store", "students", "rival", "claims", "samples")
    teacher: str = input_path(..., "the teacher's model folder")
    store: str | None = input_path(None, "the teacher's endpoint store, which also sets the solver")
    students: tuple[str, ...] = input_path((), "model folders of students, or folders of sweeps")
    rival: str | None = input_path(
        None, "model folder of a teacher with a Gaussian path and the same data, network and budget"
    )
    out: str = output_path(..., "folder to write: study.json, one picture per claim")
    claims: tuple[Claim, ...] = Field(
        CLAIMS, min_length=1, description="claims to test; all: all claims whose inputs are given"
    )
    samples: int = Field(2000, ge=2, description="samples per model, and rows of the store")
    steps: tuple[PositiveInt, ...] = Field(
        (1, 2, 4, 20), min_length=1, description="step counts of any-step students, if they divide the store's knots"
    )
    precision: Precision = Precision()
    seed: int = Field(1_000_003, ge=0, lt=2**31, description="random seed of the noise; not that of the store")
    batch_size: PositiveInt = unhashed(500, "samples per network call")

    @field_validator("claims")
    @classmethod
    def _expand_all(cls, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
        return CLAIMS if "all" in claims else tuple(claim for claim in CLAIMS if claim in claims)
