"""The layout of a store: its identity, its shards' names and schema, and the versions of its files.

STORE/manifest.json                               describes the finished store; written last
STORE/README.md                                   describes the store for people and for Hugging Face
STORE/run.json                                    the MLflow run that made the store
STORE/receipts-0123456789ab.json                  receipts of an unfinished store; removed after the manifest is written
STORE/data/guidance=1.0/shard-000042.parquet      one shard
"""

import json
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import PositiveInt

from kac.conditioning import known_classes
from kac.model import ModelConfig
from kac.path import PathConfig
from kac.util.errors import ArgumentError, DistillKacError, UnknownArgument, one_line
from kac.util.fingerprint import fingerprint, hashed_fields, hashed_values, with_neutral_values
from kac.util.options import Options, flatten
from pipeline.config import RolloutRecipe

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CARD = "README.md"
DATA = "data"

SAMPLE_ID, LABEL, KINETIC_ENERGY, INTERVAL = "sample_id", "label", "kinetic_energy", "interval"
START, END = "knot_start", "knot_end"
SCALAR_TYPES = {SAMPLE_ID: pa.int64(), LABEL: pa.int32(), KINETIC_ENERGY: pa.float32(), INTERVAL: pa.int32()}

Model = TypeVar("Model", bound=Options)


class StoreError(DistillKacError):
    """A store or a shard is missing, unfinished or damaged, or has an unexpected identity."""


class NewerVersion(StoreError):
    """The file was written by a newer version of this project."""


class StoreIdentity(RolloutRecipe):
    """Everything that determines the rows of a store.

    The number of rows and the guidance scales are not part of the identity, so a store can grow.
    """

    teacher_sha256: str
    path: PathConfig
    sample_shape: tuple[PositiveInt, ...]
    class_frequencies: tuple[float, ...]
    data_sha256: str | None = None
    labels: Literal["classes", "null"] = "classes"  # the network's labels: drawn classes, or always the null label

    @classmethod
    def of(cls, recipe: RolloutRecipe, teacher: ModelConfig) -> Self:
        """Return the identity of the store that a rollout of ``teacher`` with this recipe writes."""
        options = {name: value for name, value in hashed_fields(recipe).items() if name in RolloutRecipe.model_fields}
        return cls(
            **options,
            teacher_sha256=teacher.weights_sha256,
            path=teacher.path,
            sample_shape=teacher.sample_shape,
            class_frequencies=teacher.class_frequencies,
            data_sha256=teacher.data_sha256 if recipe.source == "forward" else None,
            labels="classes" if known_classes(teacher) else "null",
        )

    def fingerprint(self) -> str:
        """Return the hash of the identity. The manifest, every shard and every student contain it."""
        return fingerprint({"stage": "rollout", **hashed_values(self)})

    def values(self) -> dict[str, Any]:
        """Return the fields that determine the rows, as plain values for files and messages."""
        return hashed_fields(self)

    def difference(self, found: "StoreIdentity") -> str:
        """List the fields in which ``found`` differs from this identity, such as "seed is 0, expected 5"."""

        def short(value: Any) -> str:
            text = str(value)
            return text if len(text) <= 40 else f"{text[:12]}..."

        wanted, actual = flatten(self.values()), flatten(found.values())
        names = [name for name in {**wanted, **actual} if wanted.get(name) != actual.get(name)]
        return "; ".join(f"{name} is {short(actual.get(name))}, expected {short(wanted.get(name))}" for name in names)

    @property
    def is_forward(self) -> bool:
        """Whether each row is one interval of noised data instead of a trajectory."""
        return self.source == "forward"

    @property
    def knot_columns(self) -> list[str]:
        """The columns that store states: one per knot, or a forward interval's start and end."""
        return [START, END] if self.is_forward else [knot_column(k, self.knots) for k in range(self.knots + 1)]

    @property
    def scalar_columns(self) -> list[str]:
        """The columns that store one number per row."""
        return [name for name in SCALAR_TYPES if name != INTERVAL or self.is_forward]

    def arrow_schema(self) -> pa.Schema:
        """Return the Arrow schema of a shard, without metadata."""
        knot = pa.fixed_shape_tensor(pa.from_numpy_dtype(np.dtype(self.dtype)), self.sample_shape)
        names = [*self.scalar_columns, *self.knot_columns]
        return pa.schema([pa.field(name, SCALAR_TYPES.get(name, knot), nullable=False) for name in names])


def check_identity(
    found: StoreIdentity, expected: StoreIdentity, problem: str, advice: str, error: type[StoreError] = StoreError
) -> None:
    """Raise ``error`` if the identities differ. The message has ``problem``, the differing fields and ``advice``."""
    if found.fingerprint() != expected.fingerprint():
        raise error(f"{problem}: {expected.difference(found)}. {advice}")


def knot_column(k: int, knots: int) -> str:
    """Return the name of knot k's column. ``knot_00`` is the noise, and the last knot is the image."""
    return f"knot_{k:0{max(2, len(str(knots)))}d}"


@dataclass(frozen=True, order=True)
class Shard:
    """The unit of work: one file with samples ``start`` to ``start + rows - 1`` of one guidance scale."""

    guidance: float
    index: int
    start: int
    rows: int

    @property
    def name(self) -> str:
        """The path relative to the store."""
        return f"{guidance_folder(self.guidance)}/shard-{self.index:06d}.parquet"

    @property
    def ids(self) -> range:
        """The sample ids of the rows."""
        return range(self.start, self.start + self.rows)

    def to_json(self) -> str:
        """Return the shard as JSON text that can be sent to a Ray Data task."""
        return json.dumps([self.guidance, self.index, self.start, self.rows])

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuild a shard from the text that ``to_json`` returned."""
        return cls(*json.loads(text))


def guidance_folder(w: float) -> str:
    """Return a guidance scale's folder, a Hive partition, as a path relative to the store."""
    return f"{DATA}/guidance={float(w)!r}"


def parse_shard_name(name: str, shard_size: int = 1) -> Shard | None:
    """Return the shard that a path names, with ``shard_size`` rows. Return None if the path does not name a shard."""
    try:
        w, index = name.removeprefix(f"{DATA}/guidance=").removesuffix(".parquet").split("/shard-")
        shard = Shard(float(w), int(index), int(index) * shard_size, shard_size)
    except ValueError:
        return None
    # Accept only the canonical spelling. Otherwise, guidance=0 and guidance=0.0 would name the same shard.
    return shard if index.isdigit() and shard.name == name else None


def check_version(where: str, version: Any) -> None:
    """Raise ``NewerVersion`` if a newer version wrote the file, and ``ValueError`` if ``version`` is not an integer."""
    if not isinstance(version, int):
        raise ValueError("its schema_version is not an integer")
    if version > SCHEMA_VERSION:
        problem = f"{where} has schema version {version}, but this version of distillkac reads up to {SCHEMA_VERSION}"
        raise NewerVersion(f"{problem}. Install a newer distillkac.")


def parse(where: str, model: type[Model], text: str | bytes) -> Model:
    """Parse the JSON of a file. Fields that an older version did not write get their neutral values.

    Raises ``NewerVersion`` for unknown fields or a newer schema_version, and ``ValueError`` for any other fault.
    """
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError("it is empty, truncated or not a JSON object")
    if "schema_version" in model.model_fields:
        check_version(where, values.get("schema_version"))
    try:
        return model(**with_neutral_values(model, values))
    except ArgumentError as error:
        # A newer version also writes all fields in `always_written`. If one of these fields is missing, the unknown
        # field is more likely the missing field with a damaged name.
        always_written = {name for name, field in model.model_fields.items() if field.default is not None}
        if isinstance(error, UnknownArgument) and always_written <= values.keys():
            problem = f"{where} was written by a newer version of distillkac: it has the unknown field {error.name}"
            raise NewerVersion(f"{problem}. Install a newer distillkac.") from None
        raise ValueError(one_line(error, 160)) from None
