"""One frozen spec a stage: what a job's command line, a YAML file and a fingerprint are made of.

Most fields decide what comes out and enter the fingerprint. The others (``unhashed``) say where and how fast the work
is done, and how much of it. Inputs enter a fingerprint by content, never by path: see ``Spec.fingerprint``. Whoever
changes the default of a hashed field keeps the old one as its neutral value: see ``kac.util.fingerprint``.
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
    """Whether S3 must answer for its paths before the stage begins."""

    @model_validator(mode="after")
    def _has_no_secret(self) -> Self:
        """A spec is written into outputs and into MLflow."""
        for name, value in flatten(self.model_dump(mode="json")).items():
            if any(
                has_secret(text) for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)
            ):
                raise ValueError(
                    f"`{name}`: expected a path or URI without a password or key in it, found one: "
                    "give keys by AWS_* or by the role of the nodes"
                )
        return self

    @model_validator(mode="after")
    def _writes_apart_from_what_it_reads(self) -> Self:
        check_apart(self)
        return self

    def fingerprint(self, **content: Any) -> str:
        """The name of what this spec makes from inputs of this ``content`` (their hashes)."""
        precision = getattr(self, "precision", None)
        assert precision is None or precision.dtype != "auto", "a fingerprint is of a spec that is settled"
        return fingerprint({"stage": self.stage, **hashed_values(self), **content})

    def settled(self, on_gpu: Callable[[], bool]) -> Self:
        """With the type that ``precision.dtype`` auto stands for: whatever runs or names a spec begins with this.

        Args:
            on_gpu: whether the work runs on GPUs; asked for only if that matters, since it may start Ray.
        """
        precision: Precision = self.precision  # type: ignore[attr-defined]
        if precision.dtype != "auto":
            return self
        return self.model_copy(update={"precision": precision.settled(on_gpu())})


FEATURE_FILE = r".+\.(pt|ts)"
"""A feature space that is a TorchScript file."""


class OptimizerConfig(Options):
    """How a network is trained. One update is one optimizer step on one batch."""

    updates: PositiveInt = Field(3000, description="optimizer updates")
    batch_size: PositiveInt = Field(256, description="samples an update, over all workers")
    learning_rate: PositiveFloat = Field(4e-3, description="peak learning rate of AdamW")
    warmup_updates: NonNegativeInt = Field(100, description="updates of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate after the warm-up: half a cosine down to 0, or constant"
    )
    accumulation: PositiveInt = Field(
        1, description="passes an update on each worker, whose gradients add up; times the workers it divides the batch"
    )
    beta2: float = Field(0.99, gt=0, lt=1, description="decay of AdamW's squared gradients")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_gradient_norm: PositiveFloat = Field(1.0, description="gradients are scaled down to this norm")
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="decay an update of the averaged weights, which are saved; at first less, (1 + n) / (10 + n)",
    )

    @model_validator(mode="after")
    def _accumulation_divides_batch(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"`accumulation`: expected a divisor of the batch size {self.batch_size}, found {self.accumulation}"
            )
        return self


SEED = Field(0, ge=0, lt=2**31, description="seed of everything that is drawn")
CHECKPOINT_UPDATES = unhashed(500, "updates between checkpoints to resume from", gt=0)
CHECKPOINT_SECONDS = unhashed(
    600.0, "and seconds between them at most, as well as updates allow; where saving takes long both are longer", gt=0
)
SAMPLE_UPDATES = unhashed(None, "updates between sheets of samples in MLflow; default: none is drawn", gt=0)
VALIDATION_UPDATES = unhashed(
    None,
    "updates between validations of the averaged weights; default: a tenth of all, at least 50, and none where they "
    "would cost more than the training; 0: none",
    ge=0,
)
DRY_RUN = unhashed(
    False, "say what the work takes, and stop before anything is written but decoded data into the cache"
)
GPU = unhashed(None, "whether each worker takes a GPU; default: where the cluster has some now")
WORKERS = unhashed(
    None,
    "Ray Train workers; MIN:MAX: as many as there is room for, and the batch is cut for MAX; 0: in this process; "
    "default: one a GPU, or 0 where there is none",
)
CPUS_PER_WORKER = unhashed(1.0, "CPUs that a worker takes", gt=0)
GPUS_PER_WORKER = unhashed(1.0, "share of a GPU that a worker takes, where it takes any", gt=0, le=1)
ACTORS = unhashed(
    None,
    "actors; MIN:MAX: as many as there is room for; 0: in this process, without Ray; default: one a GPU, or "
    "one a CPU without GPUs",
)
ACTOR_GPU = unhashed(None, "whether each actor takes a GPU; default: where the cluster has some now")
CPUS_PER_ACTOR = unhashed(None, "CPUs that an actor takes; default: 1, or 0 where it takes a GPU", ge=0)
GPUS_PER_ACTOR = unhashed(1.0, "share of a GPU that an actor takes, where it takes any", gt=0, le=1)


def by_name(option: str, given: Any, name: str = "FIELD") -> Any:
    """Words NAME=VALUE as a mapping; anything else as it is. Raises ``ValueError``."""
    if not isinstance(given, list | tuple):
        return given
    pairs = [str(word).partition("=") for word in given]
    wrong = next((str(word) for word, (key, equals, _) in zip(given, pairs, strict=True) if not (key and equals)), None)
    if wrong is not None:
        raise ValueError(f"{option}: expected {name}=VALUE, found {wrong!r}")
    if len({key for key, _, _ in pairs}) < len(pairs):
        raise ValueError(f"{option}: expected each {name.lower()} once, found {' '.join(map(str, given))}")
    return {key: value for key, _, value in pairs}


Labels = Annotated[dict[str, str], BeforeValidator(lambda given: by_name("`label_selector`", given, "KEY"))]
LABEL_SELECTOR = unhashed(
    {}, "labels that a node must have to take part of this work: KEY=VALUE, KEY=!VALUE, 'KEY=in(ONE,OTHER)'"
)

REGISTER = unhashed(None, "name to register the student under in MLflow's model registry; default: it is not")


def as_registered_name(name: str | None) -> str | None:
    """The name, if MLflow's registry takes it; raises ``ValueError``."""
    if name is not None and (not name.strip() or name in {".", ".."} or set(name) & set("/:")):
        raise ValueError(f"`register`: expected a name without / and :, found {name!r}")
    return name


def as_teacher(network: NetworkConfig) -> NetworkConfig:
    """The network, if it can be a teacher's; raises ``ValueError``."""
    if network.conditions:
        raise ValueError("a teacher takes time and label alone: leave `network.conditions` out")
    return network


class TeachSpec(Spec):
    """Train a Kac-flow teacher on a dataset (flow matching, Ray Train)."""

    stage = "teach"
    data: DataConfig = DataConfig()
    out: str = output_path(..., "model folder to write: a path or s3:// URI")
    path: PathConfig = PathConfig()
    network: NetworkConfig = MLPConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = Precision()
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="share of labels dropped, for guidance; 1: an unconditional teacher"
    )
    seed: int = SEED
    workers: Count | None = WORKERS
    gpu: bool | None = GPU
    cpus_per_worker: float = CPUS_PER_WORKER
    gpus_per_worker: float = GPUS_PER_WORKER
    label_selector: Labels = LABEL_SELECTOR
    checkpoint_updates: int = CHECKPOINT_UPDATES
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    sample_updates: int | None = SAMPLE_UPDATES
    validation_updates: int | None = VALIDATION_UPDATES
    dry_run: bool = DRY_RUN

    @field_validator("network")
    @classmethod
    def _takes_time_and_label_alone(cls, network: NetworkConfig) -> NetworkConfig:
        return as_teacher(network)

    @model_validator(mode="after")
    def _drops_labels_for_a_null_label(self) -> Self:
        if self.label_dropout and not self.network.has_null_label:
            raise ValueError(
                "`label_dropout`: expected 0, since this network has no null label (it knows classes alone), found "
                f"{self.label_dropout}"
            )
        return self


class ConvertSpec(Spec):
    """Make a teacher of weights that others trained: a U-Net of OpenAI or diffusers, or any module."""

    stage = "convert"
    checkpoint: str = input_path(
        ..., "file of weights: .safetensors, or one of torch.save; a path or s3:// URI", kind="any"
    )
    out: str = output_path(..., "model folder to write: a path or s3:// URI")
    data: DataConfig
    path: PathConfig = PathConfig()
    network: NetworkConfig = UNetConfig(
        channels=(128, 256, 256, 256), attention=(16,), head_channels=64, time_scale=1.0
    )
    key: str | None = Field(
        None, description="prefix of the weights in the file; default: the only weights that fit, or their average"
    )

    @field_validator("network")
    @classmethod
    def _takes_time_and_label_alone(cls, network: NetworkConfig) -> NetworkConfig:
        return as_teacher(network)


class RolloutRecipe(Options):
    """The options of a rollout that decide its rows and how they are cut into shards.

    Together with the teacher's own facts they are a store's identity.
    """

    source: Literal["trajectory", "forward"] = Field(
        "trajectory",
        description="trajectory: follow the teacher from noise, keep every knot; forward: noise data points to the "
        "start of a random interval and follow the teacher through it (arXiv 2509.21513, Algorithm 1)",
    )
    knots: PositiveInt = Field(20, description="intervals whose ends are stored: knot 0 is noise, the last the image")
    knot_grid: KnotGrid = Field("uniform", description="where the knots lie between t = 1 and t = 0")
    solver: Method = Field("ab2", description="solver of the teacher")
    solver_steps: PositiveInt = Field(100, description="solver steps from noise to image, a multiple of `knots`")
    precision: Precision = Precision()
    seed: int = SEED
    shard_size: PositiveInt = Field(1024, description="trajectories a shard")
    dtype: Literal["float32", "float16"] = Field("float32", description="type of the stored knots")

    @model_validator(mode="after")
    def _steps_fit_knots(self) -> Self:
        if self.solver_steps % self.knots:
            raise ValueError(f"`solver_steps`: expected a multiple of `knots` {self.knots}, found {self.solver_steps}")
        return self


class RolloutSpec(RolloutRecipe, Spec):
    """Roll the frozen teacher out into an endpoint store (Ray Data)."""

    stage = "rollout"
    teacher: str = input_path(..., "model folder of the teacher: a path or s3:// URI")
    store: str = output_path(..., "store to write: a path or s3:// URI")
    trajectories: PositiveInt = unhashed(12000, "trajectories for each guidance scale; may be raised later")
    first_sample: NonNegativeInt = unhashed(
        0, "id of the first one, a multiple of `shard_size`, for stores to be merged"
    )
    guidance: tuple[float, ...] = unhashed(
        (0.0,), "guidance scales w; 0 is none; others may be added later", min_length=1
    )
    compression: Literal["none", "zstd", "lz4"] = unhashed(
        "lz4", "Parquet compression of the knots (byte-stream split)"
    )
    batch_size: PositiveInt = unhashed(512, "trajectories a network call")
    actors: Count | None = ACTORS
    gpu: bool | None = ACTOR_GPU
    cpus_per_actor: float | None = CPUS_PER_ACTOR
    gpus_per_actor: float = GPUS_PER_ACTOR
    label_selector: Labels = LABEL_SELECTOR
    dry_run: bool = DRY_RUN

    @field_validator("guidance")
    @classmethod
    def _once_each(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(dict.fromkeys(float(w) + 0.0 for w in scales))

    @model_validator(mode="after")
    def _first_sample_begins_a_shard(self) -> Self:
        if self.first_sample % self.shard_size:
            raise ValueError(
                f"`first_sample`: expected a multiple of `shard_size` {self.shard_size}, found {self.first_sample}"
            )
        return self


class StudentOptions(Options):
    """What a student and a whole sweep of students have in common."""

    store: str = input_path(..., "endpoint store: a path or s3:// URI")
    objective: ObjectiveConfig = EndpointConfig()
    refine: RefinementConfig = NoRefinementConfig()
    init: str = input_path(
        "teacher", "weights to start from: teacher, or the model folder of a previous student", pattern="(?!teacher$).+"
    )
    teacher: str | None = input_path(None, "folder of the store's teacher; default: where the rollout found it")
    optimizer: OptimizerConfig = OptimizerConfig(updates=2000, learning_rate=3e-3, warmup_updates=50)
    precision: Precision = Precision()
    seed: int = SEED
    checkpoint_updates: int = CHECKPOINT_UPDATES
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    sample_updates: int | None = SAMPLE_UPDATES
    validation_updates: int | None = VALIDATION_UPDATES
    held_out_rows: NonNegativeInt = Field(
        0,
        description="last trajectories of each guidance scale that are not learned, but show while training how far "
        "from the teacher's images the student lands",
    )
    memory_gib: PositiveFloat = unhashed(4.0, "columns up to this size are loaded by each worker; larger ones stream")


class DistillSpec(StudentOptions, Spec):
    """Distill a student of a few macro steps from an endpoint store (Ray Train)."""

    stage = "distill"
    out: str = output_path(..., "model folder to write: a path or s3:// URI")
    guidance: float | Literal["all"] = Field(
        0.0, description="guidance scale of the store to learn; all: every one, and the network is told which"
    )
    steps: PositiveInt = Field(
        4, description="macro steps of the student, a divisor of the store's knots; of an any-step student its default"
    )
    workers: Count | None = WORKERS
    gpu: bool | None = GPU
    cpus_per_worker: float = CPUS_PER_WORKER
    gpus_per_worker: float = GPUS_PER_WORKER
    label_selector: Labels = LABEL_SELECTOR
    register: str | None = REGISTER
    dry_run: bool = DRY_RUN

    @field_validator("register")
    @classmethod
    def _is_registered_name(cls, name: str | None) -> str | None:
        return as_registered_name(name)

    @model_validator(mode="after")
    def _refines_one_scale(self) -> Self:
        if self.refine.kind == "data" and self.guidance == "all":
            raise ValueError(
                "`refine` data: expected one `guidance`, since the data would bring all scales to the same images, "
                "found all"
            )
        return self


STEP_COUNTS = (1, 2, 4, 20)
"""Those of a grid that says nothing else."""


class SweepSpec(StudentOptions, Spec):
    """Distill many students of one store, by default one for each step count, judge them and say which is best (Ray
    Tune)."""

    stage = "sweep"
    out: str = output_path(..., "folder to write: one student folder a trial below it, and the answer")
    steps: tuple[PositiveInt, ...] | None = unhashed(
        None,
        "macro step counts, short for `grid` steps=...; a flow map is one student for all of them; default: 1 2 4 20, "
        "with `chain` its counts, with `search` 4",
    )
    guidance: tuple[float | Literal["all"], ...] | None = unhashed(
        None, "guidance scales, short for `grid` guidance=...; all: one student for all; default: 0"
    )
    grid: dict[str, tuple[Any, ...]] = unhashed(
        {}, "axes of the grid, any field of jobs.distill: steps=1,2 optimizer.learning-rate=1e-3,2e-3"
    )
    chain: tuple[PositiveInt, ...] = unhashed(
        (), "step counts of students that each start from the one before, beside the grid's: 20 4 2 1"
    )
    search: dict[str, str] = unhashed(
        {},
        "fields to search in place of a grid, whose axes are then drawn from too: "
        "'optimizer.learning-rate=loguniform(1e-4,3e-3)'; also uniform, randint (both ends included), choice",
    )
    trials: NonNegativeInt = unhashed(0, "trials of `search`; may be raised later")
    searcher: Literal["random", "optuna"] = unhashed("optuna", "what proposes the values of `search`")
    asha: bool = unhashed(False, "stop trials early that are behind the best (asynchronous successive halving)")
    asha_metric: str = unhashed(
        "validation/energy_distance", "what `asha` and optuna go by, of what a trial reports as it trains"
    )
    asha_factor: float = unhashed(3.0, "of so many trials one goes on at each halving", gt=1)
    grace_updates: PositiveInt = unhashed(500, "updates before a trial may be stopped")
    metric: str | None = unhashed(
        None, "what the best student is best in; default: the Frechet distance in the last of `features`"
    )
    samples: NonNegativeInt = unhashed(2000, "samples a student that it is judged by; 0: none is judged")
    features: tuple[str, ...] = input_path(
        ("pixels", "classifier"), "feature spaces, as of jobs.evaluate", kind="file", pattern=FEATURE_FILE, min_length=1
    )
    rollout: bool = unhashed(False, "add guidance scales that the store lacks to it first")
    register: str | None = unhashed(None, "name under which the best student is registered in MLflow")
    workers: int | None = unhashed(None, "Ray Train workers a trial; default: the trial's own process", ge=0)
    cpus_per_trial: PositiveFloat = unhashed(1.0, "CPUs a trial, or with `workers` each of them")
    gpus_per_trial: float | None = unhashed(
        None,
        "GPUs a trial, or with `workers` each of them, or a share of one; default: 1 where the cluster has some, "
        "else 0",
        ge=0,
    )
    label_selector: Labels = LABEL_SELECTOR

    @field_validator("grid", "search", mode="before")
    @classmethod
    def _by_field(cls, given: Any, info: ValidationInfo) -> Any:
        """Words FIELD=VALUE,VALUE as a mapping; a single value is an axis too."""
        if isinstance(given, list | tuple):
            given = by_name(f"`{info.field_name}`", given)
        if info.field_name == "search" or not isinstance(given, dict):
            return given
        axes = {name: _axis(values) for name, values in given.items()}
        for name, values in axes.items():
            if not values or any(value in ("", None) for value in values):
                raise ValueError(f"`grid`: expected {name}=VALUE,VALUE, found no value")
        return axes

    @field_validator("chain", mode="before")
    @classmethod
    def _chain_of_one_word(cls, given: Any) -> Any:
        return (
            given[0].split(",")
            if isinstance(given, list | tuple) and len(given) == 1 and "," in str(given[0])
            else given
        )

    @field_validator("chain")
    @classmethod
    def _descends(cls, chain: tuple[int, ...]) -> tuple[int, ...]:
        if len(chain) == 1 or any(after >= before for before, after in pairwise(chain)):
            raise ValueError(f"`chain`: expected two or more step counts, each below the one before, found {chain}")
        return chain

    @field_validator("register")
    @classmethod
    def _is_registered_name(cls, name: str | None) -> str | None:
        return as_registered_name(name)

    @field_validator("steps", "guidance")
    @classmethod
    def _has_values(cls, values: tuple[Any, ...] | None, info: ValidationInfo) -> tuple[Any, ...] | None:
        if values == ():
            raise ValueError(f"`{info.field_name}`: expected at least one value, found none")
        return values

    @field_validator("features")
    @classmethod
    def _are_feature_spaces(cls, features: tuple[str, ...]) -> tuple[str, ...]:
        check_names(features)
        return features


def _axis(values: Any) -> tuple[Any, ...]:
    if isinstance(values, str):
        return tuple(value.strip() for value in values.split(","))
    return tuple(values) if isinstance(values, list | tuple) else (values,)


class EvaluateSpec(Spec):
    """Compare a teacher and its students from the same noise."""

    stage = "evaluate"
    teacher: str | None = input_path(
        None, "model folder of the teacher; default: that of the students, with `from_sweep` or `runs`"
    )
    students: tuple[str, ...] = input_path((), "model folders of students, or folders of a sweep")
    from_sweep: str | None = input_path(None, "folder of a finished sweep, whose front is judged again")
    runs: tuple[str, ...] = unhashed((), "ids of runs in MLflow, whose students are compared")
    out: str = output_path(..., "folder to write: evaluation.json, samples.png, quality_by_nfe.png")
    samples: int = Field(5000, ge=2, description="samples a model")
    steps: tuple[PositiveInt, ...] = Field(
        (1, 2, 4, 20), min_length=1, description="step counts at which any-step students are judged"
    )
    guidance: tuple[float, ...] = Field(
        (), description="scales at which students of all scales are judged; default: those that they have learned"
    )
    solver: Method = Field("ab2", description="solver of the teacher")
    solver_steps: PositiveInt = Field(TEACHER_STEPS, description="solver steps of the teacher")
    precision: Precision = Precision()
    seed: int = Field(1_000_003, ge=0, lt=2**31, description="seed of the noise, other than the store's")
    seeds: PositiveInt = Field(1, description="noise seeds, from `seed` on; with several the table has means +- 95 %")
    features: tuple[str, ...] = Field(
        ("pixels", "classifier"),
        min_length=1,
        description="feature spaces: pixels; classifier (trained here on the data's labels, cached); lite0 and "
        "inception (ImageNet's, extras of this package); FILE.pt (TorchScript); package.module:factory",
        json_schema_extra=reads("file", FEATURE_FILE),
    )
    batch_size: PositiveInt = Field(500, description="samples a network call")
    actors: Count | None = ACTORS
    gpu: bool | None = ACTOR_GPU
    cpus_per_actor: float | None = CPUS_PER_ACTOR
    gpus_per_actor: float = GPUS_PER_ACTOR
    label_selector: Labels = LABEL_SELECTOR

    @field_validator("features")
    @classmethod
    def _are_feature_spaces(cls, features: tuple[str, ...]) -> tuple[str, ...]:
        check_names(features)
        return features

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Self:
        if not self.teacher and not self.from_sweep and not self.runs:
            raise ValueError("`teacher` is required.")
        return self


Claim = Literal["stability", "speed", "solver", "guidance", "memorisation", "marginals", "plane", "all"]

CLAIMS: tuple[Claim, ...] = ("stability", "speed", "solver", "guidance", "memorisation", "marginals", "plane")


class StudySpec(Spec):
    """Measure what the papers of Kac flows claim, on a teacher, its store and its students."""

    stage = "study"
    teacher: str = input_path(..., "model folder of the teacher")
    store: str | None = input_path(None, "endpoint store of the teacher; its solver is the teacher's")
    students: tuple[str, ...] = input_path((), "model folders of students, or folders of a sweep")
    rival: str | None = input_path(
        None, "model folder of a teacher with a Gaussian path, of the same data, network and budget"
    )
    out: str = output_path(..., "folder to write: study.json, one picture a claim")
    claims: tuple[Claim, ...] = Field(
        CLAIMS, min_length=1, description="what is measured; all: everything whose inputs are given"
    )
    samples: int = Field(2000, ge=2, description="samples a model, and rows of the store")
    steps: tuple[PositiveInt, ...] = Field(
        (1, 2, 4, 20), min_length=1, description="step counts of any-step students, where they divide the store's knots"
    )
    precision: Precision = Precision()
    seed: int = Field(1_000_003, ge=0, lt=2**31, description="seed of the noise, other than the store's")
    batch_size: PositiveInt = unhashed(500, "samples a network call")

    @field_validator("claims")
    @classmethod
    def _all_or_once_each(cls, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
        return CLAIMS if "all" in claims else tuple(claim for claim in CLAIMS if claim in claims)


ClassWord = Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)]
"""A class by its name or number."""


class SampleSpec(Spec):
    """Draw images from a teacher or a student."""

    stage = "sample"
    model: str = input_path(..., "model folder")
    out: str = output_path(..., "file to write: .png (a sheet) or .npz (images in [-1, 1] and labels)", kind="file")
    raw: bool = Field(False, description="the network's own values, neither clipped nor rounded to 8 bits; .npz only")
    count: PositiveInt = Field(100, description="number of images")
    labels: tuple[ClassWord, ...] | None = Field(
        None,
        description="classes by name or number, repeated in turn: cat dog, or 3 5; where classes are named by "
        "numbers, a number is a name; default: the data's class frequencies",
    )
    guidance: float | None = Field(
        None, description="guidance scale, of a teacher (default 0) or of a student that has learned all scales"
    )
    steps: PositiveInt | None = Field(
        None, description="solver steps of a teacher (default 100), or steps of an any-step student (default its own)"
    )
    solver: Method = Field("ab2", description="solver of a teacher")
    precision: Precision = Precision()
    seed: int = SEED


class QuickstartSpec(Spec):
    """The whole story on the handwritten digits, on one machine: teach, rollout, distill, refine, evaluate, report."""

    stage = "quickstart"
    out: str = output_path(..., "folder to write")
    seed: int = SEED
    trajectories: PositiveInt = unhashed(12000, "trajectories of the store")
    steps: tuple[PositiveInt, ...] = unhashed(
        (1, 2, 4, 20), "step counts at which the students are judged", min_length=1
    )
