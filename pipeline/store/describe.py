"""Describe a store from its manifest, its shards' footers and its column of kinetic energies."""

import json
import math
from typing import Annotated, Any

import numpy as np
import yaml

from kac.util.fingerprint import unhashed
from kac.util.log import log
from kac.util.options import OptionStyle
from kac.util.path_options import input_path
from pipeline.config import Spec
from pipeline.store.layout import KINETIC_ENERGY, Shard
from pipeline.store.manifest import list_shards, merge_ranges
from pipeline.store.order import rows_of
from pipeline.store.reader import Store, open_store
from pipeline.store.shards import column_array, map_in_threads, read_rows

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

StorePath = Annotated[str, OptionStyle(metavar="STORE", positional=True)]
"""A store as a positional argument of a job."""


class DescribeSpec(Spec):
    """Print the identity, the size and the kinetic energies of a store."""

    stage = "describe"
    store: StorePath = input_path(..., "endpoint store: a path or s3:// URI")
    as_json: Annotated[bool, OptionStyle(name="json")] = unhashed(False, "print JSON")


def run(spec: DescribeSpec) -> None:
    """Log the description as YAML or JSON."""
    description = describe(spec.store)
    text = yaml.safe_dump(description, sort_keys=False, default_flow_style=None, width=120).rstrip()
    log.info(json.dumps(description, indent=2) if spec.as_json else text)


def describe(path: str) -> dict[str, Any]:
    """Return a description of a store that can be written as JSON. Reads only one column, the kinetic energy.

    Raises:
        StoreError: the store does not exist, a newer version wrote it, or a shard is missing or damaged.
    """
    store, sizes = open_store(path, allow_unfinished=True), list_shards(path)
    identity, manifest, rows = store.identity, store.manifest, rows_of(store.shards)
    state_bytes = math.prod(identity.sample_shape) * np.dtype(identity.dtype).itemsize
    return {
        "store": path,
        "is_finished": manifest is not None,
        "fingerprint": identity.fingerprint(),
        "identity": identity.values(),
        "teacher": manifest.teacher if manifest else None,  # the path that the rollout used
        "scales": [_describe_scale(store, w, sizes) for w in store.guidance],
        "rows": rows,
        "shards": len(store.shards),
        "bytes": sum(sizes[shard.name] for shard in store.shards),
        "tensor_bytes": rows * len(identity.knot_columns) * state_bytes,  # size of the knots before encoding
    }


def _describe_scale(store: Store, guidance: float, sizes: dict[str, int]) -> dict[str, Any]:
    def energies(shard: Shard) -> np.ndarray:
        return column_array(read_rows(store.path, store.identity, shard, [KINETIC_ENERGY])[KINETIC_ENERGY])

    shards = [shard for shard in store.shards if shard.guidance == guidance]
    energy = np.concatenate(map_in_threads(energies, shards)).astype(np.float64)
    return {
        "guidance": guidance,
        "rows": rows_of(shards),
        "ids": merge_ranges((shard.ids.start, shard.ids.stop) for shard in shards),
        "shards": len(shards),
        "bytes": sum(sizes[shard.name] for shard in shards),
        "kinetic_energy": {f"{q:.0%}": float(np.quantile(energy, q)) for q in QUANTILES},
    }
