"""Describe a store, from its manifest, its footers and one column."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np

from kac.util.fingerprint import unhashed
from kac.util.log import log
from kac.util.options import OptionStyle, flatten
from kac.util.path_options import input_path
from pipeline.config import Spec
from pipeline.store.columns import read_rows
from pipeline.store.layout import KINETIC_ENERGY, Shard
from pipeline.store.manifest import IdRange, list_shards, merge_ranges
from pipeline.store.reader import Store, open_store
from pipeline.store.shards import column_array
from pipeline.store.threads import map_in_threads

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

StorePath = Annotated[str, OptionStyle(metavar="STORE", positional=True)]
"""A store as a positional argument of a job."""


class DescribeSpec(Spec):
    """Print the identity, the size and the kinetic energies of a store."""

    stage = "describe"
    store: StorePath = input_path(..., "endpoint store: a path or s3:// URI")
    as_json: Annotated[bool, OptionStyle(name="json")] = unhashed(False, "print JSON")


@dataclass(frozen=True)
class GuidanceSummary:
    """The content of a store for one guidance scale."""

    guidance: float
    rows: int
    ids: tuple[IdRange, ...]
    shards: int
    bytes: int
    kinetic_energy: dict[str, float]  # quantiles: "0%" to "100%"


@dataclass(frozen=True)
class Description:
    """The description of a store."""

    store: str
    is_finished: bool
    fingerprint: str
    identity: dict[str, Any]
    teacher: str | None  # path that the rollout used; None for an unfinished store
    scales: tuple[GuidanceSummary, ...]
    rows: int
    shards: int
    bytes: int
    tensor_bytes: int  # of the knots, before encoding


def run(spec: DescribeSpec) -> None:
    """Log the description as text or JSON."""
    description = describe(spec)
    log.info(json.dumps(asdict(description), indent=2) if spec.as_json else _as_text(description))


def describe(spec: DescribeSpec) -> Description:
    """Describe ``spec.store``. Only the kinetic energies of its rows are read.

    Raises:
        StoreError: the store does not exist or is from a newer version, or a shard is missing or damaged.
    """
    store = open_store(spec.store, allow_unfinished=True)
    sizes, identity = list_shards(spec.store), store.identity
    scales = tuple(_summarize(store, w, sizes) for w in store.guidance)
    rows = sum(scale.rows for scale in scales)
    state_bytes = math.prod(identity.sample_shape) * np.dtype(identity.dtype).itemsize
    return Description(
        store=spec.store,
        is_finished=store.manifest is not None,
        fingerprint=identity.fingerprint(),
        identity=identity.values(),
        teacher=store.manifest.teacher if store.manifest else None,
        scales=scales,
        rows=rows,
        shards=len(store.shards),
        bytes=sum(scale.bytes for scale in scales),
        tensor_bytes=rows * len(identity.knot_columns) * state_bytes,
    )


def _summarize(store: Store, guidance: float, sizes: dict[str, int]) -> GuidanceSummary:
    def energies(shard: Shard) -> np.ndarray:
        return column_array(read_rows(store.path, store.identity, shard, [KINETIC_ENERGY])[KINETIC_ENERGY])

    shards = [shard for shard in store.shards if shard.guidance == guidance]
    energy = np.concatenate(map_in_threads(energies, shards)).astype(np.float64)
    return GuidanceSummary(
        guidance=guidance,
        rows=sum(shard.rows for shard in shards),
        ids=merge_ranges([(shard.ids.start, shard.ids.stop) for shard in shards]),
        shards=len(shards),
        bytes=sum(sizes[shard.name] for shard in shards),
        kinetic_energy={f"{q:.0%}": float(np.quantile(energy, q)) for q in QUANTILES},
    )


def _as_text(description: Description) -> str:
    """Return the description for people, one fact per line."""
    ratio = description.bytes / description.tensor_bytes
    facts = [
        ("store", description.store),
        ("state", "finished" if description.is_finished else "unfinished; run the rollout again to finish it"),
        ("fingerprint", description.fingerprint),
        ("teacher", description.teacher or "unknown until the store is finished"),
        *((name, _plain(value)) for name, value in flatten(description.identity).items()),
        ("guidance", " ".join(f"{scale.guidance:g}" for scale in description.scales)),
        ("rows", f"{description.rows:,} in {description.shards:,} shards"),
        ("bytes", f"{description.bytes:,} ({ratio:.3f} of the raw tensors' {description.tensor_bytes:,})"),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {value}" for name, value in facts]
    return "\n".join([*lines, *(line for scale in description.scales for line in _scale_lines(scale))])


def _scale_lines(scale: GuidanceSummary) -> list[str]:
    ids = ", ".join(f"{start} to {stop - 1}" for start, stop in scale.ids)
    quantiles = "  ".join(f"{name} {value:.4g}" for name, value in scale.kinetic_energy.items())
    content = f"{scale.rows:,} rows, samples {ids}, {scale.shards} shards, {scale.bytes:,} bytes"
    return [f"guidance {scale.guidance:g}: {content}", f"  kinetic energy: {quantiles}"]


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(f"{part:.4g}" if isinstance(part, float) else str(part) for part in value)
    return "none" if value is None else str(value)
