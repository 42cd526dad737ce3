"""The options of evaluate, study and sample, which draw samples from models, and of quickstart."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, field_validator, model_validator

from kac.precision import Precision
from kac.sampling import TEACHER_STEPS
from kac.solvers import KnotGrid, SolverName
from kac.util.fingerprint import unhashed
from kac.util.path_options import input_path, output_path, reads
from pipeline.config.spec import FEATURE_FILE, SEED, TIME_FACTOR, ActorOptions, Features, Spec

NOISE_SEED = Field(1_000_003, ge=0, lt=2**31, description="seed of the noise; should differ from the store's seed")


class EvaluateSpec(ActorOptions, Spec):
    """Compare a teacher and its students from the same noise."""

    stage = "evaluate"
    common = ("teacher", "students", "from_sweep", "runs", "samples", "features", "steps", "guidance")
    teacher: str | None = input_path(
        None, "the teacher's model folder; default, with `from_sweep` or `runs`: the students' teacher"
    )
    students: tuple[str, ...] = input_path((), "model folders of students, or folders of sweeps")
    from_sweep: str | None = input_path(None, "folder of a finished sweep, to re-evaluate its Pareto-optimal students")
    runs: tuple[str, ...] = unhashed((), "ids of MLflow runs, to evaluate their students")
    out: str = output_path(..., "folder to write: evaluation.json, samples.png, quality_by_nfe.png")
    samples: int = Field(5000, ge=2, description="samples per model")
    steps: tuple[PositiveInt, ...] = Field((1, 2, 4, 20), min_length=1, description="step counts for any-step students")
    guidance: tuple[float, ...] = Field(
        (),
        description="guidance scales for the teacher, and for students that take any scale; default: the scales that "
        "students learned",
    )
    solver: SolverName = Field("ab2", description="the teacher's solver")
    solver_steps: PositiveInt = Field(TEACHER_STEPS, description="the teacher's solver steps")
    knot_grid: KnotGrid = Field("uniform", description="spacing of the teacher's solver steps from t = 1 to t = 0")
    time_factor: float = TIME_FACTOR
    precision: Precision = Precision()
    seed: int = NOISE_SEED
    seeds: PositiveInt = Field(
        1, description="number of consecutive noise seeds, starting at `seed`; several seeds give means +- 95 %"
    )
    features: Features = Field(
        ("pixels", "classifier"),
        min_length=1,
        description="feature spaces: pixels; classifier (trained on the data's labels, cached); lite0, inception "
        "(trained on ImageNet; each needs one of this package's extras); FILE.pt (TorchScript); package.module:factory",
        json_schema_extra=reads("file", FEATURE_FILE),
    )
    batch_size: PositiveInt = Field(500, description="samples per network call")

    @model_validator(mode="after")
    def _check_has_models(self) -> Self:
        if not self.teacher and not self.from_sweep and not self.runs:
            raise ValueError("`teacher` is required, unless `from_sweep` or `runs` is given.")
        return self


Claim = Literal[
    "stability", "speed", "solver", "guidance", "memorisation", "marginals", "plane", "paths", "compute", "all"
]

CLAIMS: tuple[Claim, ...] = (
    "stability",
    "speed",
    "solver",
    "guidance",
    "memorisation",
    "marginals",
    "plane",
    "paths",
    "compute",
)


class StudySpec(Spec):
    """Test the claims of the Kac-flow papers on a teacher, its store and its students."""

    stage = "study"
    common = ("store", "students", "rivals", "claims", "samples")
    teacher: str = input_path(..., "the teacher's model folder")
    store: str | None = input_path(None, "the teacher's endpoint store, which also sets the solver")
    students: tuple[str, ...] = input_path((), "model folders of students, or folders of sweeps")
    rivals: tuple[str, ...] = input_path(
        (), "model folders of teachers with another path or seed, and the same data, network and training budget"
    )
    out: str = output_path(..., "folder to write: study.json, one picture per claim, paths.md, compute.md")
    claims: tuple[Claim, ...] = Field(
        CLAIMS, min_length=1, description="claims to test; all: every claim whose inputs are given"
    )
    samples: int = Field(2000, ge=2, description="samples per model, and rows read from the store")
    steps: tuple[PositiveInt, ...] = Field(
        (1, 2, 4, 20), min_length=1, description="any-step students' step counts; used if they divide the store's knots"
    )
    precision: Precision = Precision()
    seed: int = NOISE_SEED
    batch_size: PositiveInt = unhashed(500, "samples per network call")

    @field_validator("claims")
    @classmethod
    def _expand_all(cls, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
        return CLAIMS if "all" in claims else tuple(claim for claim in CLAIMS if claim in claims)


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
        description="classes by name or number, used in rotation: cat dog, or 3 5; if the classes have numeric names, "
        "a number is taken as a name; default: the data's class frequencies",
    )
    guidance: float | None = Field(
        None, description="guidance scale of a teacher (default: 0), or of a student that takes any scale"
    )
    steps: PositiveInt | None = Field(
        None, description="a teacher's solver steps (default: 100), or an any-step student's steps (default: its own)"
    )
    solver: SolverName = Field("ab2", description="a teacher's solver")
    knot_grid: KnotGrid = Field("uniform", description="spacing of a teacher's solver steps from t = 1 to t = 0")
    time_factor: float = TIME_FACTOR
    precision: Precision = Precision()
    seed: int = SEED


class QuickstartSpec(Spec):
    """Run all stages on the handwritten digits, on one machine: teach, rollout, distill, refine, evaluate, report."""

    stage = "quickstart"
    out: str = output_path(..., "folder to write")
    seed: int = SEED
    trajectories: PositiveInt = unhashed(12000, "trajectories in the store")
    steps: tuple[PositiveInt, ...] = unhashed((1, 2, 4, 20), "step counts to evaluate", min_length=1)
