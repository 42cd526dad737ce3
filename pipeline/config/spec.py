"""The base class of specs, and the options that several stages share. A spec holds the options of one stage.

A spec defines a job's command line, the layout of its YAML file, and a fingerprint. Fields that change the result are
part of the fingerprint. ``unhashed`` fields are not: they set only where, how fast and how much work is done. Inputs
are hashed by their content, not by their path (``Spec.fingerprint``). If you change the default of a hashed
field, keep the old default as its neutral value (``kac.util.fingerprint``).
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from kac.metrics.features import check_names
from kac.precision import Precision
from kac.util.errors import has_secret
from kac.util.fingerprint import fingerprint, hashed_values, unhashed
from kac.util.options import Count, Options, flatten
from kac.util.path_options import check_apart


class Spec(Options):
    """The options of a stage."""

    stage: ClassVar[str]
    section: ClassVar[str] = ""
    """The section of a ``--config`` file with this spec's options; empty: the section is named after the stage."""
    is_probed: ClassVar[bool] = True
    """Whether a job checks, before the stage starts, that S3 answers for this spec's paths."""
    common: ClassVar[tuple[str, ...]] = ()
    """Fields that ``--help`` lists first, after the required ones."""

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        for name, value in flatten(self.model_dump(mode="json")).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and has_secret(text):  # specs are written to outputs and to MLflow
                    raise ValueError(
                        f"`{name}` contains a password or key. Use the AWS_* variables or the nodes' IAM role instead."
                    )
        check_apart(self)
        return self

    def fingerprint(self, **content: Any) -> str:
        """Return the fingerprint of this spec's output. ``content`` holds the hashes of the inputs."""
        precision = getattr(self, "precision", None)
        assert precision is None or precision.dtype != "auto", "call settled() before fingerprint()"
        return fingerprint({"stage": self.stage, **hashed_values(self), **content})

    def settled(self, on_gpu: Callable[[], bool]) -> Self:
        """Replace a ``precision.dtype`` of auto with an actual type. Stages call this first.

        ``on_gpu`` returns whether the work runs on GPUs. It may start Ray, so it is called only if the type is auto.
        """
        precision: Precision = self.precision  # type: ignore[attr-defined]
        if precision.dtype != "auto":
            return self
        return self.model_copy(update={"precision": precision.settled(on_gpu())})


class OptimizerConfig(Options):
    """How to train a network. An update is one optimizer step on one batch."""

    updates: PositiveInt = Field(3000, description="optimizer updates")
    batch_size: PositiveInt = Field(256, description="samples per update, summed over all workers")
    learning_rate: PositiveFloat = Field(4e-3, description="peak learning rate of AdamW")
    warmup_updates: NonNegativeInt = Field(100, description="updates of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate after the warm-up; cosine: decay to 0 over half a period"
    )
    accumulation: PositiveInt = Field(
        1, description="passes per update, with summed gradients; accumulation x workers must divide the batch size"
    )
    beta2: float = Field(0.99, gt=0, lt=1, description="decay rate of AdamW's average of squared gradients")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    max_gradient_norm: PositiveFloat = Field(1.0, description="clip gradients to this norm")
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="decay of the averaged weights (saved as the model); at most (1 + n) / (10 + n) after n updates",
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
"""Mark the fields that ``--help`` lists in separate groups."""

FEATURE_FILE = r".+\.(pt|ts)"
"""Matches the name of a feature space that is a TorchScript file."""

SEED = Field(0, ge=0, lt=2**31, description="random seed")
TIME_FACTOR = Field(
    1.0,
    gt=0,
    le=1,
    description="a teacher's network receives this factor times t; slightly below 1, images have more detail",
)
DRY_RUN = unhashed(False, "print the cost of the work and stop; only decoded data is written, to the cache")


class TrainingOptions(Options):
    """How often a training run saves, draws samples and validates."""

    checkpoint_updates: int = unhashed(500, "updates between checkpoints", DURING_TRAINING, gt=0)
    checkpoint_seconds: float = unhashed(
        600.0, "maximum seconds between checkpoints; longer if saving is slow", DURING_TRAINING, gt=0
    )
    sample_updates: int | None = unhashed(
        None, "updates between sheets of samples in MLflow; default: no sheets", DURING_TRAINING, gt=0
    )
    validation_updates: int | None = unhashed(
        None,
        "updates between validations of the averaged weights; 0: no validation; default: a tenth of all updates, but "
        "at least 50, or no validation if it would take longer than training",
        DURING_TRAINING,
        ge=0,
    )


def parse_pairs(option: str, given: Any, name: str = "FIELD") -> Any:
    """Convert a list of NAME=VALUE words to a mapping; return other values unchanged. Raises ``ValueError``."""
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


class WorkerOptions(Options):
    """The workers of a training run and their resources."""

    workers: Count | None = unhashed(
        None,
        "number of Ray Train workers, or a range MIN:MAX such as 2:8 that adapts to the cluster; 0: train in this "
        "process; default: one per GPU, or 0 if there is no GPU",
        RESOURCES,
    )
    gpu: bool | None = unhashed(None, "whether workers use GPUs; default: True if the cluster has GPUs now", RESOURCES)
    cpus_per_worker: float = unhashed(1.0, "CPUs per worker", RESOURCES, gt=0)
    gpus_per_worker: float = unhashed(1.0, "GPUs per worker if workers use GPUs, at most 1", RESOURCES, gt=0, le=1)
    label_selector: LabelSelector = LABEL_SELECTOR


class ActorOptions(Options):
    """The actors of a rollout or an evaluation and their resources."""

    actors: Count | None = unhashed(
        None,
        "number of actors, or a range MIN:MAX such as 2:8 that adapts to the cluster; 0: work in this process "
        "without Ray; default: one per GPU, or one per CPU if there is no GPU",
        RESOURCES,
    )
    gpu: bool | None = unhashed(None, "whether actors use GPUs; default: True if the cluster has GPUs now", RESOURCES)
    cpus_per_actor: float | None = unhashed(None, "CPUs per actor; default: 0 with GPUs, otherwise 1", RESOURCES, ge=0)
    gpus_per_actor: float = unhashed(1.0, "GPUs per actor if actors use GPUs, at most 1", RESOURCES, gt=0, le=1)
    label_selector: LabelSelector = LABEL_SELECTOR


def _check_registered_name(name: str) -> str:
    if not name.strip() or name in {".", ".."} or set(name) & set("/:"):
        raise ValueError(f"`register` is {name!r}, which MLflow does not accept. Give a name without / or :.")
    return name


RegisteredName = Annotated[str, AfterValidator(_check_registered_name)]


def _check_features(features: tuple[str, ...]) -> tuple[str, ...]:
    check_names(features)
    return features


Features = Annotated[tuple[str, ...], AfterValidator(_check_features)]
