"""What a store is: its identity, the names of its shards, and their schema.

STORE/manifest.json                               what it is; written last
STORE/data/guidance=1.0/shard-000042.parquet      one shard
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from kac.errors import DistillKacError
from kac.options import Options
from kac.path import PathConfig
from kac.solvers import Method
from pipeline.config import fingerprint

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
DATA = "data"

SAMPLE_ID, LABEL, KINETIC_ENERGY, INTERVAL = "sample_id", "label", "kinetic_energy", "interval"
START, END = "knot_start", "knot_end"

_SHARD_NAME = re.compile(rf"{DATA}/guidance=(?P<guidance>[^/]+)/shard-(?P<index>\d{{6,}})\.parquet")


class StoreError(DistillKacError):
    """A store, or one of its shards, is missing, unfinished, damaged or not what was asked for."""


class StoreIdentity(Options):
    """All that the rows of a store are a function of. How many there are, and for which guidance scales, may grow."""

    source: Literal["trajectory", "forward"]
    teacher_sha256: str
    path: PathConfig
    solver: Method
    solver_steps: int
    knots: int
    seed: int
    shard_size: int
    dtype: Literal["float32", "float16"]
    sample_shape: tuple[int, ...]
    class_frequencies: tuple[float, ...]
    data_sha256: str | None = None

    def fingerprint(self) -> str:
        """The name of the store's content: in the manifest, in every shard and in every student."""
        return fingerprint(self.model_dump(mode="json"))

    @property
    def knot_columns(self) -> list[str]:
        """The columns that hold states: one a knot, or the two ends of a forward interval."""
        return [START, END] if self.source == "forward" else [knot_column(k, self.knots) for k in range(self.knots + 1)]

    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema of a shard, without its metadata."""
        knot = pa.fixed_shape_tensor(pa.from_numpy_dtype(np.dtype(self.dtype)), self.sample_shape)
        fields = [
            pa.field(SAMPLE_ID, pa.int64(), nullable=False),
            pa.field(LABEL, pa.int32(), nullable=False),
            pa.field(KINETIC_ENERGY, pa.float32(), nullable=False),
        ]
        if self.source == "forward":
            fields.append(pa.field(INTERVAL, pa.int32(), nullable=False))
        return pa.schema(fields + [pa.field(name, knot, nullable=False) for name in self.knot_columns])


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

    @property
    def ids(self) -> range:
        """The sample ids of the rows."""
        return range(self.start, self.start + self.rows)

    def metadata(self, identity: StoreIdentity) -> dict[str, str]:
        """What the Parquet file says of itself; together with the columns it is all a reader needs."""
        return {
            "schema_version": str(SCHEMA_VERSION),
            "fingerprint": identity.fingerprint(),
            "guidance": repr(self.guidance),
            "start": str(self.start),
            "rows": str(self.rows),
            "spec": json.dumps(identity.model_dump(mode="json"), sort_keys=True),
        }


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


def plan_shards(guidance: float, ids: range, shard_size: int) -> list[Shard]:
    """The shards that hold ``ids``, which start at a multiple of ``shard_size``; the last may be short."""
    return [
        Shard(guidance, start // shard_size, start, min(shard_size, ids.stop - start))
        for start in range(ids.start, ids.stop, shard_size)
    ]


def describe_difference(expected: StoreIdentity, found: StoreIdentity) -> str:
    """The fields in which two identities differ, for a refusal."""
    ours, theirs = expected.model_dump(mode="json"), found.model_dump(mode="json")
    return ", ".join(
        f"{name} {_short(ours[name])} (found {_short(theirs[name])})" for name in ours if ours[name] != theirs[name]
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
