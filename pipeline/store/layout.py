"""What a store is: its identity, the names of its shards, and their schema.

STORE/manifest.json                               what it is; written last
STORE/run.json                                    the run of MLflow that it was made in
STORE/receipts-0123456789ab.json                  receipts of an unfinished store; see ``receipts``
STORE/data/guidance=1.0/shard-000042.parquet      one shard
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt

from kac.conditioning import known_classes
from kac.model import ModelConfig
from kac.path import PathConfig
from kac.util.errors import DistillKacError
from kac.util.fingerprint import fingerprint, hashed_fields, hashed_values
from kac.util.options import flatten
from pipeline.config.specs import RolloutRecipe

MANIFEST = "manifest.json"
DATA = "data"

SAMPLE_ID, LABEL, KINETIC_ENERGY, INTERVAL = "sample_id", "label", "kinetic_energy", "interval"
START, END = "knot_start", "knot_end"

_SHARD_NAME = re.compile(rf"{DATA}/guidance=(?P<guidance>[^/]+)/shard-(?P<index>\d{{6,}})\.parquet")


class StoreError(DistillKacError):
    """A store, or one of its shards, is missing, unfinished, damaged or not what was asked for."""


class StoreIdentity(RolloutRecipe):
    """All that the rows of a store are a function of. How many there are, and for which guidance scales, may grow."""

    teacher_sha256: str
    path: PathConfig
    sample_shape: tuple[PositiveInt, ...]
    class_frequencies: tuple[float, ...]
    data_sha256: str | None = None
    labels: Literal["classes", "null"] = Field(
        "classes", description="what the network was given: drawn classes, or always the null label"
    )

    @classmethod
    def of(cls, recipe: RolloutRecipe, teacher: ModelConfig) -> Self:
        """The identity of what a recipe makes with a teacher."""
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
        """The name of the store's content: in the manifest, in every shard and in every student."""
        return fingerprint({"stage": "rollout", **hashed_values(self)})

    def values(self) -> dict[str, Any]:
        """The fields that decide the rows, as plain values: for files and for messages."""
        return hashed_fields(self)

    def difference(self, found: "StoreIdentity") -> str:
        """The fields in which another identity differs from this one, for a refusal."""
        ours, theirs = flatten(self.values()), flatten(found.values())
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        return ", ".join(f"{name} {_short(ours.get(name))} (found {_short(theirs.get(name))})" for name in names)

    @property
    def knot_columns(self) -> list[str]:
        """The columns that hold states: one a knot, or the two ends of a forward interval."""
        return [START, END] if self.source == "forward" else [knot_column(k, self.knots) for k in range(self.knots + 1)]

    @property
    def scalar_columns(self) -> list[str]:
        """The other columns."""
        return [SAMPLE_ID, LABEL, KINETIC_ENERGY, *([INTERVAL] if self.source == "forward" else [])]

    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema of a shard, without its metadata."""
        scalars = {SAMPLE_ID: pa.int64(), LABEL: pa.int32(), KINETIC_ENERGY: pa.float32(), INTERVAL: pa.int32()}
        knot = pa.fixed_shape_tensor(pa.from_numpy_dtype(np.dtype(self.dtype)), self.sample_shape)
        names = [*self.scalar_columns, *self.knot_columns]
        return pa.schema([pa.field(name, scalars.get(name, knot), nullable=False) for name in names])


def knot_column(k: int, knots: int) -> str:
    """The column of knot k of 0 .. knots: ``knot_00`` is noise, the last is the image."""
    return f"knot_{k:0{max(2, len(str(knots)))}d}"


@dataclass(frozen=True, order=True)
class Shard:
    """The unit of work: the rows ``start`` .. ``start + rows - 1`` of one guidance scale, in one file."""

    guidance: float
    index: int
    start: int
    rows: int

    @property
    def name(self) -> str:
        """Path below the store."""
        return f"{guidance_folder(self.guidance)}/shard-{self.index:06d}.parquet"

    def as_text(self) -> str:
        """The shard as it is sent to who works on it."""
        return json.dumps([self.guidance, self.index, self.start, self.rows])

    @classmethod
    def of_text(cls, text: str) -> Self:
        """The shard that ``as_text`` says."""
        return cls(*json.loads(text))

    @property
    def ids(self) -> range:
        """The sample ids of the rows."""
        return range(self.start, self.start + self.rows)


def plan_shards(guidance: float, ids: range, shard_size: int) -> list[Shard]:
    """The shards that hold ``ids``, which start at a multiple of ``shard_size``; the last may be short."""
    return [
        Shard(guidance, start // shard_size, start, min(shard_size, ids.stop - start))
        for start in range(ids.start, ids.stop, shard_size)
    ]


def guidance_folder(w: float) -> str:
    """The folder of a guidance scale, below the store: a Hive partition."""
    return f"{DATA}/guidance={float(w)!r}"


def parse_shard_name(name: str) -> tuple[float, int] | None:
    """The guidance scale and index in a shard's path below the store; None if it is no shard's.

    Only the way a plan writes them counts: ``guidance=0`` would name a shard of ``guidance=0.0`` a second time.
    """
    match = _SHARD_NAME.fullmatch(name)
    try:
        parsed = (float(match["guidance"]), int(match["index"])) if match else None
    except ValueError:
        return None
    return parsed if parsed and Shard(*parsed, 0, 0).name == name else None


def full_shard(name: str, shard_size: int) -> Shard | None:
    """The shard of ``shard_size`` rows that a path below the store stands for; None if it is no shard's."""
    parsed = parse_shard_name(name)
    return Shard(*parsed, parsed[1] * shard_size, shard_size) if parsed else None


def refuse_other(store: str, wanted: StoreIdentity, found: StoreIdentity, advice: str, expected: str = "") -> None:
    """Refuse a store of another identity.

    Args:
        expected: in words; empty: a new store, or one of the wanted identity.

    Raises:
        StoreError: the message names the fields that differ.
    """
    expected = expected or "a new store or one of this identity"
    if found.fingerprint() != wanted.fingerprint():
        difference = wanted.difference(found)
        raise StoreError(f"{store}: expected {expected}, found one of another: {difference}: {advice}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
