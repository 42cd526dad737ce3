"""One frozen spec a stage: what a job's command line, a YAML file and a fingerprint are made of.

A field is either part of *what* is made (it enters the fingerprint) or of *how and where* (``how(...)``: it does not).
Inputs enter a fingerprint by content, never by path: see ``Spec.fingerprint``.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from kac.data import DataName
from kac.networks import NetworkConfig
from kac.options import Options
from kac.path import PathConfig
from kac.solvers import Method


def fingerprint(values: dict[str, Any]) -> str:
    """sha256 of the values as canonical JSON: the one way this project names content."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def how(default: Any, description: str, **constraints: Any) -> Any:
    """A field that changes where or how fast the work is done, but not what comes out."""
    return Field(default, description=description, json_schema_extra={"how": True}, **constraints)


class Spec(Options):
    """The options of a stage."""

    def identity(self) -> dict[str, Any]:
        """The fields that decide what comes out."""
        fields = type(self).model_fields
        hidden = {name for name, field in fields.items() if (field.json_schema_extra or {}).get("how")}  # type: ignore[union-attr]
        return self.model_dump(mode="json", exclude=hidden)

    def fingerprint(self, **content: Any) -> str:
        """The fingerprint of what this spec makes from inputs of this ``content`` (their hashes)."""
        return fingerprint({"stage": type(self).__name__, **self.identity(), **content})


class OptimizerConfig(Options):
    """How a network is trained. One update is one optimizer step on one batch."""

    updates: PositiveInt = Field(3000, description="optimizer updates")
    batch_size: PositiveInt = Field(256, description="samples an update, over all workers")
    learning_rate: PositiveFloat = Field(4e-3, description="peak learning rate of AdamW")
    warmup_updates: NonNegativeInt = Field(100, description="updates of linear warm-up; then a cosine down to 0")
    beta2: float = Field(0.99, gt=0, lt=1, description="decay of AdamW's squared gradients")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    max_gradient_norm: PositiveFloat = Field(1.0, description="gradients are scaled down to this norm")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay an update of the averaged weights, which are saved")


DISTILL_OPTIMIZER = OptimizerConfig(updates=2000, learning_rate=3e-3, warmup_updates=50)
"""A student starts from trained weights: it needs fewer updates, and gentler ones."""

SEED = Field(0, ge=0, lt=2**31, description="seed of everything that is drawn")
CHECKPOINT_UPDATES = how(500, "updates between checkpoints to resume from", gt=0)
GPU = how(None, "whether each worker takes a GPU; default: where the cluster has some now")
WORKERS = how(None, "Ray Train workers; 0: in this process; default: one a GPU, or 0 where there is none", ge=0)


class TeachSpec(Spec):
    """Train a Kac-flow teacher on a dataset (flow matching, Ray Train)."""

    data: DataName = Field("digits", description="dataset to learn")
    out: str = how(..., "model folder to write: a path or s3:// URI")
    path: PathConfig = PathConfig()
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of labels dropped, for guidance")
    seed: int = SEED
    workers: int | None = WORKERS
    gpu: bool | None = GPU
    checkpoint_updates: int = CHECKPOINT_UPDATES


class RolloutSpec(Spec):
    """Roll the frozen teacher out into an endpoint store (Ray Data)."""

    teacher: str = how(..., "model folder of the teacher: a path or s3:// URI")
    store: str = how(..., "store to write: a path or s3:// URI")
    source: Literal["trajectory", "forward"] = Field(
        "trajectory",
        description="trajectory: follow the teacher from noise, keep every knot; forward: noise data points to the "
        "start of a random interval and follow the teacher through it (arXiv 2509.21513, Algorithm 1)",
    )
    trajectories: PositiveInt = how(12000, "trajectories for each guidance scale; may be raised later")
    first_sample: NonNegativeInt = how(0, "id of the first one, a multiple of --shard-size, for stores to be merged")
    guidance: tuple[float, ...] = how((0.0,), "guidance scales w; 0 is none; others may be added later", min_length=1)
    knots: PositiveInt = Field(20, description="intervals whose ends are stored: knot 0 is noise, the last the image")
    solver: Method = Field("ab2", description="solver of the teacher")
    solver_steps: PositiveInt = Field(100, description="solver steps from noise to image, a multiple of --knots")
    seed: int = SEED
    shard_size: PositiveInt = Field(1024, description="trajectories a shard")
    dtype: Literal["float32", "float16"] = Field("float32", description="type of the stored knots")
    compression: Literal["none", "zstd", "lz4"] = how("lz4", "Parquet compression of the knots, bytes split by place")
    batch_size: PositiveInt = how(512, "trajectories a network call")
    actors: int | None = how(None, "rollout actors; default: one a GPU, or one a CPU where there is none", ge=1)
    gpu: bool | None = how(None, "whether each actor takes a GPU; default: where the cluster has some now")

    @field_validator("guidance")
    @classmethod
    def _once_each(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(dict.fromkeys(float(w) + 0.0 for w in scales))

    @model_validator(mode="after")
    def _fits(self) -> "RolloutSpec":
        if self.solver_steps % self.knots:
            raise ValueError(f"--solver-steps: expected a multiple of --knots {self.knots}, found {self.solver_steps}")
        if self.first_sample % self.shard_size:
            raise ValueError(
                f"--first-sample: expected a multiple of --shard-size {self.shard_size}, found {self.first_sample}"
            )
        return self


class DistillSpec(Spec):
    """Distill a student of a few macro steps from an endpoint store (Ray Train)."""

    store: str = how(..., "endpoint store: a path or s3:// URI")
    out: str = how(..., "model folder to write: a path or s3:// URI")
    guidance: float = Field(0.0, description="guidance scale of the store to learn")
    steps: PositiveInt = Field(4, description="macro steps of the student; divides the store's knots")
    init: str = how("teacher", "weights to start from: teacher, or the model folder of a previous student")
    teacher: str | None = how(None, "folder of the store's teacher; default: where the rollout found it")
    optimizer: OptimizerConfig = DISTILL_OPTIMIZER
    seed: int = SEED
    workers: int | None = WORKERS
    gpu: bool | None = GPU
    checkpoint_updates: int = CHECKPOINT_UPDATES
    memory_gib: PositiveFloat = how(4.0, "columns up to this size are loaded once a worker; larger ones stream")


class SweepSpec(Spec):
    """Distill a student for every combination of step count and guidance scale (Ray Tune)."""

    store: str = how(..., "endpoint store: a path or s3:// URI")
    out: str = how(..., "folder to write: one student folder a trial below it")
    steps: tuple[PositiveInt, ...] = how((1, 2, 4, 20), "macro step counts", min_length=1)
    guidance: tuple[float, ...] = how((0.0,), "guidance scales", min_length=1)
    grid: tuple[str, ...] = how((), "more axes, as FIELD=VALUE,VALUE: optimizer.learning-rate=1e-3,2e-3")
    init: str = how("teacher", "weights to start from: teacher, or the model folder of a previous student")
    teacher: str | None = how(None, "folder of the store's teacher; default: where the rollout found it")
    optimizer: OptimizerConfig = DISTILL_OPTIMIZER
    seed: int = SEED
    workers: int | None = how(None, "Ray Train workers a trial; default: the trial's own process", ge=0)
    cpus_per_trial: PositiveFloat = how(1.0, "CPUs a trial")
    gpus_per_trial: float | None = how(None, "GPUs a trial; default: 1 where the cluster has some, else 0", ge=0)
    checkpoint_updates: int = CHECKPOINT_UPDATES
    memory_gib: PositiveFloat = how(4.0, "columns up to this size are loaded once a trial; larger ones stream")


class EvaluateSpec(Spec):
    """Compare a teacher and its students from the same noise."""

    teacher: str = how(..., "model folder of the teacher")
    students: tuple[str, ...] = how((), "model folders of students, or folders of a sweep")
    out: str = how(..., "folder to write: evaluation.json, samples.png, frechet_by_nfe.png")
    samples: int = Field(5000, ge=2, description="samples a model")
    solver: Method = Field("ab2", description="solver of the teacher")
    solver_steps: PositiveInt = Field(100, description="solver steps of the teacher")
    seed: int = Field(1_000_003, ge=0, lt=2**31, description="seed of the noise, other than the store's")
    batch_size: PositiveInt = Field(500, description="samples a network call")


class SampleSpec(Spec):
    """Draw images from a teacher or a student."""

    model: str = how(..., "model folder")
    out: str = how(..., "file to write: .png (a sheet) or .npz (images in [-1, 1] and labels)")
    count: PositiveInt = Field(100, description="number of images")
    labels: tuple[NonNegativeInt, ...] | None = Field(
        None, description="classes, repeated in turn; default: the data's class frequencies"
    )
    guidance: float | None = Field(None, description="guidance scale, of a teacher only (default 0)")
    steps: PositiveInt | None = Field(None, description="solver steps, of a teacher only (default 100)")
    solver: Method = Field("ab2", description="solver of a teacher")
    seed: int = SEED


class QuickstartSpec(Spec):
    """The whole story on the handwritten digits, on one machine: teach, rollout, sweep, evaluate, report."""

    out: str = how(..., "folder to write")
    seed: int = SEED
    trajectories: PositiveInt = how(12000, "trajectories of the store")
    steps: tuple[PositiveInt, ...] = how((1, 2, 4, 20), "step counts of the students", min_length=1)
