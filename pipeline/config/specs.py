"""The options of each stage: one frozen spec per stage.

A spec defines a job's command line, the layout of a YAML file, and a fingerprint. Fields that change the result enter
the fingerprint. ``unhashed`` fields do not: they only say where, how fast and how much work is done. Inputs enter a
fingerprint by their content, not by their path (``Spec.fingerprint``). If the default of a hashed field changes, the
old default must stay its neutral value (``kac.util.fingerprint``).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kac.data import DataConfig
from kac.losses import EndpointConfig, ObjectiveConfig
from kac.losses.refinement import NoRefinementConfig, RefinementConfig
from kac.metrics.features import check_names
from kac.networks import MLPConfig, NetworkConfig, UNetConfig
from kac.path import PathConfig
from kac.precision import Precision
from kac.sampling import TEACHER_STEPS
from kac.solvers import KnotGrid, Method
from kac.util.errors import has_secret
from kac.util.fingerprint import fingerprint, hashed_values, unhashed
from kac.util.options import Count, Options, flatten
from kac.util.path_options import check_apart, input_path, output_path, reads


class Spec(Options):
    """The options of a stage."""

    stage: ClassVar[str]
    is_probed: ClassVar[bool] = True
    """Whether a job checks, before the stage starts, that S3 answers for the paths of this spec."""
    common: ClassVar[tuple[str, ...]] = ()
    """Fields that ``--help`` lists first, after the required ones."""

    @model_validator(mode="after")
    def _check_no_secret(self) -> Self:
        """Specs are written into outputs and into MLflow."""
        for name, value in flatten(self.model_dump(mode="json")).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and has_secret(text):
                    raise ValueError(
                        f"`{name}` contains a password or key. Set the AWS_* variables, or use the role of the nodes."
                    )
        return self

    @model_validator(mode="after")
    def _check_apart(self) -> Self:
        check_apart(self)
        return self

    def fingerprint(self, **content: Any) -> str:
        """Return the fingerprint of the output of this spec.

        Args:
            content: hashes of the inputs.
        """
        precision = getattr(self, "precision", None)
        assert precision is None or precision.dtype != "auto", "call settled() before fingerprint()"
        return fingerprint({"stage": self.stage, **hashed_values(self), **content})

    def settled(self, on_gpu: Callable[[], bool]) -> Self:
        """Return the spec with ``precision.dtype`` auto replaced by a type. Stages call this first.

        Args:
            on_gpu: returns whether the work runs on GPUs. Called only for auto, because it may start Ray.
        """
        precision: Precision = self.precision  # type: ignore[attr-defined]
        if precision.dtype != "auto":
            return self
        return self.model_copy(update={"precision": precision.settled(on_gpu())})


class OptimizerConfig(Options):
    """Training of a network. An update is one optimizer step on one batch."""

    updates: PositiveInt = Field(3000, description="optimizer updates")
    batch_size: PositiveInt = Field(256, description="samples per update, over all workers")
    learning_rate: PositiveFloat = Field(4e-3, description="peak learning rate of AdamW")
    warmup_updates: NonNegativeInt = Field(100, description="updates of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate after the warm-up; cosine: half a period, down to 0"
    )
    accumulation: PositiveInt = Field(
        1, description="passes per update, with added gradients; accumulation x workers divides the batch size"
    )
    beta2: float = Field(0.99, gt=0, lt=1, description="AdamW's decay of squared gradients")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    max_gradient_norm: PositiveFloat = Field(1.0, description="clip gradients to this norm")
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="decay per update of the averaged weights, which are saved; at first (1 + n) / (10 + n)",
    )

    @model_validator(mode="after")
    def _check_accumulation(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"`accumulation` {self.accumulation} does not divide the batch size {self.batch_size}. "
                f"Choose a divisor of {self.batch_size}."
            )
        return self


RESOURCES, DURING_TRAINING = {"group": "resources"}, {"group": "during training"}
"""Marks of fields that ``--help`` lists in a group of their own."""

FEATURE_FILE = r".+\.(pt|ts)"
"""Matches a feature space that is a TorchScript file."""

SEED = Field(0, ge=0, lt=2**31, description="random seed")
CHECKPOINT_UPDATES = unhashed(500, "updates between checkpoints", DURING_TRAINING, gt=0)
CHECKPOINT_SECONDS = unhashed(
    600.0, "save a checkpoint at least this often, in seconds; less often if saving is slow", DURING_TRAINING, gt=0
)
SAMPLE_UPDATES = unhashed(
    None, "updates between sheets of samples in MLflow; default: no sheets", DURING_TRAINING, gt=0
)
VALIDATION_UPDATES = unhashed(
    None,
    "updates between validations of the averaged weights; 0: no validation; default: a tenth of all updates, at least "
    "50, or no validation if it would take longer than the training",
    DURING_TRAINING,
    ge=0,
)
DRY_RUN = unhashed(False, "print the cost of the work and stop; only decoded data is written, to the cache")
GPU = unhashed(None, "whether each worker uses a GPU; default: if the cluster has GPUs now", RESOURCES)
WORKERS = unhashed(
    None,
    "Ray Train workers, or MIN:MAX (2:8) to use as many as fit; 0: this process; default: one per GPU, or 0 without "
    "GPUs",
    RESOURCES,
)
CPUS_PER_WORKER = unhashed(1.0, "CPUs per worker", RESOURCES, gt=0)
GPUS_PER_WORKER = unhashed(1.0, "GPUs per worker, at most 1, if it uses one", RESOURCES, gt=0, le=1)
ACTORS = unhashed(
    None,
    "actors, or MIN:MAX (2:8) to use as many as fit; 0: this process, without Ray; default: one per GPU, or per CPU "
    "without GPUs",
    RESOURCES,
)
ACTOR_GPU = unhashed(None, "whether each actor uses a GPU; default: if the cluster has GPUs now", RESOURCES)
CPUS_PER_ACTOR = unhashed(None, "CPUs per actor; default: 1, or 0 if it uses a GPU", RESOURCES, ge=0)
GPUS_PER_ACTOR = unhashed(1.0, "GPUs per actor, at most 1, if it uses one", RESOURCES, gt=0, le=1)
REGISTER = unhashed(None, "register the student in MLflow under this name")


def parse_pairs(option: str, given: Any, name: str = "FIELD") -> Any:
    """Return a list of NAME=VALUE words as a mapping, and any other value unchanged. Raises ``ValueError``."""
    if not isinstance(given, list | tuple):
        return given
    pairs: dict[str, str] = {}
    for word in map(str, given):
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ValueError(f"{option} has {word!r}, which is not {name}=VALUE.")
        if key in pairs:
            raise ValueError(f"{option} has {key} twice. Give each {name.lower()} once.")
        pairs[key] = value
    return pairs


LabelSelector = Annotated[
    dict[str, str], BeforeValidator(lambda given: parse_pairs("`label_selector`", given, name="KEY"))
]
LABEL_SELECTOR = unhashed(
    {}, "use only nodes with these labels: KEY=VALUE, KEY=!VALUE or 'KEY=in(ONE,OTHER)'", RESOURCES
)


def check_registered_name(name: str | None) -> str | None:
    """Return the name; raise ``ValueError`` if MLflow's registry does not accept it."""
    if name is not None and (not name.strip() or name in {".", ".."} or set(name) & set("/:")):
        raise ValueError(f"`register` is {name!r}, which MLflow does not accept. Give a name without / and :.")
    return name


def check_teacher_network(network: NetworkConfig) -> None:
    """Raise ``ValueError`` if the network cannot be a teacher."""
    if network.conditions:
        raise ValueError("`network.conditions` must be empty, because a teacher takes only time and label.")


class TeachSpec(Spec):
    """Train a Kac-flow teacher on a dataset (flow matching, Ray Train)."""

    stage = "teach"
    common = ("label_dropout", "seed", "dry_run")
    data: DataConfig = DataConfig()
    out: str = output_path(..., "model folder to write: path or s3:// URI")
    path: PathConfig = PathConfig()
    network: NetworkConfig = MLPConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = Precision()
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="fraction of labels dropped, for guidance; 1: unconditional teacher"
    )
    seed: int = SEED
    workers: Count | None = WORKERS
    gpu: bool | None = GPU
    cpus_per_worker: float = CPUS_PER_WORKER
    gpus_per_worker: float = GPUS_PER_WORKER
    label_selector: LabelSelector = LABEL_SELECTOR
    checkpoint_updates: int = CHECKPOINT_UPDATES
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    sample_updates: int | None = SAMPLE_UPDATES
    validation_updates: int | None = VALIDATION_UPDATES
    dry_run: bool = DRY_RUN

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        check_teacher_network(self.network)
        if self.label_dropout and not self.network.has_null_label:
            raise ValueError(
                f"`label_dropout` is {self.label_dropout}, but this network has no null label. "
                "Set `label_dropout` to 0."
            )
        return self


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


class RolloutRecipe(Options):
    """The options of a rollout that determine its rows and their division into shards.

    With the facts of the teacher, these options identify a store.
    """

    source: Literal["trajectory", "forward"] = Field(
        "trajectory",
        description="trajectory: follow the teacher from noise and keep every knot; forward: noise data to the start "
        "of a random interval and follow the teacher through it (arXiv 2509.21513, Algorithm 1)",
    )
    knots: PositiveInt = Field(20, description="stored intervals; knot 0 is noise, the last the image")
    knot_grid: KnotGrid = Field("uniform", description="times of the knots between t = 1 and t = 0")
    solver: Method = Field("ab2", description="the teacher's solver")
    solver_steps: PositiveInt = Field(100, description="solver steps from noise to image, a multiple of `knots`")
    precision: Precision = Precision()
    seed: int = SEED
    shard_size: PositiveInt = Field(1024, description="trajectories per shard")
    dtype: Literal["float32", "float16"] = Field("float32", description="type of the stored knots")

    @model_validator(mode="after")
    def _check_solver_steps(self) -> Self:
        if self.solver_steps % self.knots:
            raise ValueError(
                f"`solver_steps` {self.solver_steps} is not a multiple of `knots` {self.knots}. "
                f"Choose {self.solver_steps // self.knots * self.knots + self.knots}, for example."
            )
        return self


class RolloutSpec(RolloutRecipe, Spec):
    """Store the frozen teacher's trajectories in an endpoint store (Ray Data)."""

    stage = "rollout"
    common = ("trajectories", "guidance", "knots", "solver", "solver_steps", "seed", "dry_run")
    teacher: str = input_path(..., "the teacher's model folder: path or s3:// URI")
    store: str = output_path(..., "store to write: path or s3:// URI")
    trajectories: PositiveInt = unhashed(12000, "trajectories per guidance scale; a rerun can add more")
    first_sample: NonNegativeInt = unhashed(
        0, "id of the first trajectory, a multiple of `shard_size`; for stores that will be merged"
    )
    guidance: tuple[float, ...] = unhashed(
        (0.0,), "guidance scales w, 0 is none; such as 0 1 2; a rerun can add more", min_length=1
    )
    compression: Literal["none", "zstd", "lz4"] = unhashed(
        "lz4", "Parquet compression of the knots (byte-stream split)"
    )
    batch_size: PositiveInt = unhashed(512, "trajectories per network call")
    actors: Count | None = ACTORS
    gpu: bool | None = ACTOR_GPU
    cpus_per_actor: float | None = CPUS_PER_ACTOR
    gpus_per_actor: float = GPUS_PER_ACTOR
    label_selector: LabelSelector = LABEL_SELECTOR
    dry_run: bool = DRY_RUN

    @field_validator("guidance")
    @classmethod
    def _remove_duplicates(cls, guidance: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(dict.fromkeys(float(w) + 0.0 for w in guidance))

    @model_validator(mode="after")
    def _check_first_sample(self) -> Self:
        if self.first_sample % self.shard_size:
            raise ValueError(
                f"`first_sample` {self.first_sample} is not a multiple of `shard_size` {self.shard_size}. Choose "
                f"{self.first_sample // self.shard_size * self.shard_size + self.shard_size}, for example."
            )
        return self


class StudentOptions(Options):
    """The options that a student and a sweep of students share."""

    store: str = input_path(..., "endpoint store: path or s3:// URI")
    objective: ObjectiveConfig = EndpointConfig()
    refine: RefinementConfig = NoRefinementConfig()
    init: str = input_path(
        "teacher", "initial weights: teacher, or a previous student's model folder", pattern="(?!teacher$).+"
    )
    teacher: str | None = input_path(None, "the teacher's model folder; default: the path that the rollout used")
    optimizer: OptimizerConfig = OptimizerConfig(updates=2000, learning_rate=3e-3, warmup_updates=50)
    precision: Precision = Precision()
    seed: int = SEED
    checkpoint_updates: int = CHECKPOINT_UPDATES
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    sample_updates: int | None = SAMPLE_UPDATES
    validation_updates: int | None = VALIDATION_UPDATES
    held_out_rows: NonNegativeInt = Field(
        0,
        description="hold out the last N trajectories of each guidance scale, to validate the student against the "
        "teacher's images",
        json_schema_extra=dict(DURING_TRAINING),
    )
    memory_gib: PositiveFloat = unhashed(
        4.0, "each worker loads columns up to this size, in GiB, and streams larger ones", RESOURCES
    )


class DistillSpec(StudentOptions, Spec):
    """Distill a student of a few macro steps from an endpoint store (Ray Train)."""

    stage = "distill"
    common = ("steps", "guidance", "init", "seed", "register", "dry_run")
    out: str = output_path(..., "model folder to write: path or s3:// URI")
    guidance: float | Literal["all"] = Field(
        0.0, description="guidance scale to learn; all: every scale of the store, as an input of the network"
    )
    steps: PositiveInt = Field(
        4, description="the student's steps, a divisor of the store's knots; an any-step student uses them by default"
    )
    workers: Count | None = WORKERS
    gpu: bool | None = GPU
    cpus_per_worker: float = CPUS_PER_WORKER
    gpus_per_worker: float = GPUS_PER_WORKER
    label_selector: LabelSelector = LABEL_SELECTOR
    register: str | None = REGISTER
    dry_run: bool = DRY_RUN

    @field_validator("register")
    @classmethod
    def _check_register(cls, name: str | None) -> str | None:
        return check_registered_name(name)

    @model_validator(mode="after")
    def _check_refined_guidance(self) -> Self:
        if self.refine.kind == "data" and self.guidance == "all":
            raise ValueError(
                "`refine` data needs one guidance scale, but `guidance` is all: the data would pull all scales to the "
                "same images. Give one scale."
            )
        return self


STEP_COUNTS = (1, 2, 4, 20)
"""The student steps of a sweep by default."""


class SweepSpec(StudentOptions, Spec):
    """Distill many students from one store, evaluate them and report the best (Ray Tune)."""

    stage = "sweep"
    common = ("steps", "guidance", "grid", "chain", "search", "trials", "samples", "features", "seed", "register")
    out: str = output_path(..., "folder to write: one student folder per trial, and the results")
    steps: tuple[PositiveInt, ...] | None = unhashed(
        None,
        "student steps, short for `grid` steps=1,2; a flow map is one student for all; default: 1 2 4 20, or those of "
        "`chain`, or 4 with `search`",
    )
    guidance: tuple[float | Literal["all"], ...] | None = unhashed(
        None, "guidance scales, short for `grid` guidance=0,1; all: one student for all scales; default: 0"
    )
    grid: dict[str, tuple[Any, ...]] = unhashed(
        {}, "axes of the grid, any options of jobs.distill, such as steps=1,2 optimizer.learning-rate=1e-3,2e-3"
    )
    chain: tuple[PositiveInt, ...] = unhashed(
        (), "step counts of students that each start from the one before, in addition to the grid, such as 20 4 2 1"
    )
    search: dict[str, str] = unhashed(
        {},
        "distributions to draw options from, such as 'optimizer.learning-rate=loguniform(1e-4,3e-3)', or uniform, "
        "randint (both ends included), choice; the grid's axes are then choices",
    )
    trials: NonNegativeInt = unhashed(0, "number of trials of `search`; a rerun can add more")
    searcher: Literal["random", "optuna"] = unhashed("optuna", "search algorithm of `search`")
    asha: bool = unhashed(False, "stop bad trials early (asynchronous successive halving)")
    asha_metric: str = unhashed(
        "validation/energy_distance", "metric that ASHA and Optuna optimise, reported during training"
    )
    asha_factor: float = unhashed(3.0, "keep one of every N trials at each rung", gt=1)
    grace_updates: PositiveInt = unhashed(500, "updates before a trial can be stopped")
    metric: str | None = unhashed(
        None, "metric of the best student; default: the Frechet distance in the last of `features`"
    )
    samples: NonNegativeInt = unhashed(2000, "samples per evaluated student; 0: no evaluation")
    features: tuple[str, ...] = input_path(
        ("pixels", "classifier"),
        "feature spaces of the evaluation, as in jobs.evaluate",
        kind="file",
        pattern=FEATURE_FILE,
        min_length=1,
    )
    rollout: bool = unhashed(False, "first add missing guidance scales to the store")
    register: str | None = unhashed(None, "register the best student in MLflow under this name")
    workers: int | None = unhashed(
        None, "Ray Train workers per trial; default: the trial's own process", RESOURCES, ge=0
    )
    cpus_per_trial: PositiveFloat = unhashed(1.0, "CPUs per trial, or per worker with `workers`", RESOURCES)
    gpus_per_trial: float | None = unhashed(
        None,
        "GPUs per trial, or per worker with `workers`, such as 0.5; default: 1 if the cluster has GPUs, else 0",
        RESOURCES,
        ge=0,
    )
    label_selector: LabelSelector = LABEL_SELECTOR

    @field_validator("grid", "search", mode="before")
    @classmethod
    def _parse_axes(cls, given: Any, info: ValidationInfo) -> Any:
        """Return FIELD=VALUE,VALUE words as a mapping. A single value of the grid becomes an axis of one value."""
        if isinstance(given, list | tuple):
            given = parse_pairs(f"`{info.field_name}`", given)
        if info.field_name == "search" or not isinstance(given, dict):
            return given
        axes = {name: _axis(values) for name, values in given.items()}
        for name, values in axes.items():
            if not values or any(value in ("", None) for value in values):
                raise ValueError(f"`grid` has no value for {name}. Give {name}=VALUE,VALUE.")
        return axes

    @field_validator("chain", mode="before")
    @classmethod
    def _split_commas(cls, given: Any) -> Any:
        """Accept 20,4,2,1 for 20 4 2 1."""
        if isinstance(given, list | tuple) and len(given) == 1 and "," in str(given[0]):
            return given[0].split(",")
        return given

    @field_validator("chain")
    @classmethod
    def _check_chain(cls, chain: tuple[int, ...]) -> tuple[int, ...]:
        if len(chain) == 1 or any(after >= before for before, after in pairwise(chain)):
            raise ValueError(
                f"`chain` is {' '.join(map(str, chain))}. Give two or more step counts, each smaller than the one "
                "before."
            )
        return chain

    @field_validator("register")
    @classmethod
    def _check_register(cls, name: str | None) -> str | None:
        return check_registered_name(name)

    @field_validator("steps", "guidance")
    @classmethod
    def _check_not_empty(cls, values: tuple[Any, ...] | None, info: ValidationInfo) -> tuple[Any, ...] | None:
        if values == ():
            raise ValueError(f"`{info.field_name}` has no values. Give at least one, or leave it out.")
        return values

    @field_validator("features")
    @classmethod
    def _check_features(cls, features: tuple[str, ...]) -> tuple[str, ...]:
        check_names(features)
        return features


def _axis(values: Any) -> tuple[Any, ...]:
    if isinstance(values, str):
        return tuple(value.strip() for value in values.split(","))
    return tuple(values) if isinstance(values, list | tuple) else (values,)


class EvaluateSpec(Spec):
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
    features: tuple[str, ...] = Field(
        ("pixels", "classifier"),
        min_length=1,
        description="feature spaces: pixels; classifier (trained on the data's labels, cached); lite0, inception "
        "(trained on ImageNet; need an extra of this package); FILE.pt (TorchScript); package.module:factory",
        json_schema_extra=reads("file", FEATURE_FILE),
    )
    batch_size: PositiveInt = Field(500, description="samples per network call")
    actors: Count | None = ACTORS
    gpu: bool | None = ACTOR_GPU
    cpus_per_actor: float | None = CPUS_PER_ACTOR
    gpus_per_actor: float = GPUS_PER_ACTOR
    label_selector: LabelSelector = LABEL_SELECTOR

    @field_validator("features")
    @classmethod
    def _check_features(cls, features: tuple[str, ...]) -> tuple[str, ...]:
        check_names(features)
        return features

    @model_validator(mode="after")
    def _check_has_models(self) -> Self:
        if not self.teacher and not self.from_sweep and not self.runs:
            raise ValueError("`teacher` is required, unless `from_sweep` or `runs` is given.")
        return self


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


class QuickstartSpec(Spec):
    """Run all stages on the handwritten digits, on one machine: teach, rollout, distill, refine, evaluate, report."""

    stage = "quickstart"
    out: str = output_path(..., "folder to write")
    seed: int = SEED
    trajectories: PositiveInt = unhashed(12000, "trajectories in the store")
    steps: tuple[PositiveInt, ...] = unhashed((1, 2, 4, 20), "step counts to evaluate", min_length=1)
