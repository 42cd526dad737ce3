"""Examine the Parquet files of a store: read every byte and compare it with the manifest.

A listed shard must have the sha256 of its receipt, so every flipped bit is detected. The exception is a short last
shard that a growing store has replaced by a longer one. An unfinished store has no receipts: there, examining checks
the CRC of every page, the sample ids and the values.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kac.util import files
from kac.util.errors import one_line
from pipeline.cluster import connection as cluster
from pipeline.store import shards
from pipeline.store.layout import Shard, StoreError, StoreIdentity, full_shard
from pipeline.store.manifest import Manifest
from pipeline.store.versions import NewerVersion

UNRELATED = "is not a file of this store and was left alone."
PAUSE_SECONDS = 0.1

Kind = Literal[
    "missing",  # listed in the manifest, but does not exist
    "damaged",  # not the bytes that were published
    "not finite",  # has rows with NaN or infinity
    "foreign",  # belongs to another store, or to another position in this store
    "duplicated",  # a copy of a shard under another name
    "unplanned",  # has sample ids that the manifest does not list
    "newer",  # written by a newer version
    "unreadable",  # the filesystem cannot read it
    "unfinished",  # the store has no manifest
    "leftover",  # a temporary file
    "extra",  # not a file of this project
    "",  # nothing is wrong
]


class FileCheck(NamedTuple):
    """The result of examining one file."""

    name: str
    kind: Kind
    detail: str  # the rest of a sentence that starts with the name: "has 8 rows instead of 32."
    belongs_to: str = ""  # the shard of this store that the footer names; empty if none
    sha256: str = ""
    rows: int = 0
    bytes: int = 0


def examine_all(
    store: str, identity: StoreIdentity, manifest: Manifest | None, names: Sequence[str]
) -> list[FileCheck]:
    """Examine the files on all CPUs of the cluster with Ray Data.

    Raises:
        StoreError: Ray failed.
    """
    if not names:
        return []
    import ray
    from tqdm import tqdm

    from pipeline.cluster.ray_data import each

    cluster.connect()
    receipts = {receipt.name: receipt for receipt in manifest.shards} if manifest else {}

    def examine_one(batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        name, listed = json.loads(batch["item"][0])
        result = examine(store, identity, name, shards.Receipt(**listed) if listed else None)
        return {field: [value] for field, value in result._asdict().items()}

    items = [json.dumps([name, receipts[name].model_dump() if name in receipts else None]) for name in names]
    results = each(items, examine_one, pause_seconds=PAUSE_SECONDS)
    bar = tqdm(results.iter_rows(), desc="verify", total=len(names), unit="shard", disable=None)
    try:
        return sorted(FileCheck(**row) for row in bar)
    except ray.exceptions.RayError as error:
        raise StoreError(f"Checking {store} failed in Ray: {one_line(error, 10**6)[-300:]}") from error


def examine(store: str, identity: StoreIdentity, name: str, receipt: shards.Receipt | None) -> FileCheck:
    """Examine one Parquet file of the store.

    Args:
        receipt: the entry of the file in the manifest, if it is listed.
    """
    try:
        data = files.read_bytes(files.join(store, name))
    except FileNotFoundError:
        return FileCheck(name, "missing", "was deleted during the check.")
    except OSError as error:
        return FileCheck(name, "unreadable", f"cannot be read: {one_line(error, 160)}")
    belongs_to, sha256 = _name_in_footer(identity, data), shards.sha256_of(data)
    shard, rows = full_shard(name, identity.shard_size), 0
    kind: Kind = "extra"
    detail = UNRELATED
    if shard is not None:
        kind, detail, rows = _examine_shard(store, identity, shard, receipt, data)
    elif belongs_to:
        kind, detail = "duplicated", f"is a copy of {belongs_to}."
    if kind == "foreign" and belongs_to:
        kind = "damaged" if belongs_to == name else "duplicated"
    return FileCheck(name, kind, detail.removeprefix(f"{store}/{name} "), belongs_to, sha256, rows, len(data))


def _name_in_footer(identity: StoreIdentity, data: bytes) -> str:
    """Return the name of the shard that the footer describes; empty if it is not a shard of this store."""
    try:
        metadata = shards.read_metadata("", pq.read_schema(pa.BufferReader(data)))
        found = shards.identity_in("", metadata)
        guidance, start = float(metadata["guidance"]), int(metadata["start"])
    except (*shards.UNREADABLE, NewerVersion):
        return ""
    is_same_store = found.fingerprint() == identity.fingerprint()
    return Shard(guidance, start // identity.shard_size, start, 0).name if is_same_store else ""


def _examine_shard(
    store: str, identity: StoreIdentity, shard: Shard, receipt: shards.Receipt | None, data: bytes
) -> tuple[Kind, str, int]:
    """Return the kind of the problem, its description, and the number of intact rows."""
    kinds: dict[type[StoreError], Kind] = {
        shards.ForeignShard: "foreign",
        shards.NotFiniteShard: "not finite",
        shards.DamagedShard: "damaged",
        # This version wrote every shard that its manifest lists, so another version number in one of them is damage.
        NewerVersion: "damaged" if receipt else "newer",
    }
    try:
        return "", "", shards.confirm(store, shard, identity, data, receipt).rows
    except StoreError as error:
        return kinds[type(error)], str(error), 0
