"""Examine: every Parquet file of a store is read to its last byte and compared with what it must be.

A shard that the manifest lists must have the sha256 of its receipt, so that no flipped bit goes unseen. One
difference is no damage: a short last shard that a rollout at work has replaced by a longer one. Without a manifest
there are no receipts: then the CRC of every page, the ids and the values are what is checked.
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

NOT_OURS = "no file of this store: left alone"
PAUSE_SECONDS = 0.1

Kind = Literal[
    "missing",  # planned, and not there
    "damaged",  # not the bytes that were published
    "not finite",  # rows with NaN or infinity
    "foreign",  # of another store, or of another place in this one
    "duplicated",  # a copy of a shard under another name
    "unplanned",  # sample ids that the manifest does not plan
    "newer",  # written by a newer version
    "unreadable",  # there, but the filesystem does not hand it out
    "unfinished",  # no manifest
    "leftover",  # a temporary file
    "extra",  # no file of this project
    "",  # nothing is wrong
]


class Finding(NamedTuple):
    """What was found in one file."""

    name: str
    kind: Kind
    detail: str
    belongs_to: str = ""  # the shard of this store that the footer claims to be; empty: none
    sha256: str = ""
    rows: int = 0
    bytes: int = 0


def examine_all(store: str, identity: StoreIdentity, manifest: Manifest | None, names: Sequence[str]) -> list[Finding]:
    """Examine the files on all cores of the cluster (Ray Data).

    Raises:
        StoreError: the work failed in Ray.
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
        finding = examine(store, identity, name, shards.Receipt(**listed) if listed else None)
        return {field: [value] for field, value in finding._asdict().items()}

    items = [json.dumps([name, receipts[name].model_dump() if name in receipts else None]) for name in names]
    found = each(items, examine_one, pause_seconds=PAUSE_SECONDS)
    bar = tqdm(found.iter_rows(), desc="verify", total=len(names), unit="shard", disable=None)
    try:
        return sorted(Finding(**row) for row in bar)
    except ray.exceptions.RayError as error:
        raise StoreError(f"{store}: the check failed in Ray: {one_line(error, 10**6)[-300:]}") from error


def examine(store: str, identity: StoreIdentity, name: str, receipt: shards.Receipt | None) -> Finding:
    """Examine one Parquet file of the store.

    Args:
        receipt: what the manifest knows of it; None if it is not listed.
    """
    try:
        data = files.read_bytes(files.join(store, name))
    except FileNotFoundError:
        return Finding(name, "missing", "expected a file, found none: it vanished meanwhile")
    except OSError as error:
        return Finding(name, "unreadable", f"expected a file that can be read, found: {one_line(error, 160)}")
    belongs_to, sha256 = _claimed_place(identity, data), shards.sha256_of(data)
    shard, rows = full_shard(name, identity.shard_size), 0
    kind: Kind = "extra"
    detail = NOT_OURS
    if shard is not None:
        kind, detail, rows = _judge(store, identity, shard, receipt, data)
    elif belongs_to:
        kind, detail = "duplicated", f"expected no shard under this name, found one that is {belongs_to}"
    if kind == "foreign" and belongs_to:
        kind = "damaged" if belongs_to == name else "duplicated"
    return Finding(name, kind, detail.removeprefix(f"{store}/{name}: "), belongs_to, sha256, rows, len(data))


def _claimed_place(identity: StoreIdentity, data: bytes) -> str:
    """The name of the shard of this store that a footer claims; empty if it claims none."""
    try:
        metadata = shards.read_metadata("", pq.read_schema(pa.BufferReader(data)))
        claimed = shards.identity_in("", metadata)
        guidance, start = float(metadata["guidance"]), int(metadata["start"])
    except (*shards.UNREADABLE, NewerVersion):
        return ""
    is_ours = claimed.fingerprint() == identity.fingerprint()
    return Shard(guidance, start // identity.shard_size, start, 0).name if is_ours else ""


def _judge(
    store: str, identity: StoreIdentity, shard: Shard, receipt: shards.Receipt | None, data: bytes
) -> tuple[Kind, str, int]:
    """What is wrong with a shard, in a word and in a sentence, and how many rows count."""
    kinds: dict[type[StoreError], Kind] = {
        shards.ForeignShard: "foreign",
        shards.NotFiniteShard: "not finite",
        shards.DamagedShard: "damaged",
        # What a manifest of this version lists was written by this version: another number in it is damage.
        NewerVersion: "damaged" if receipt else "newer",
    }
    try:
        return "", "", shards.confirm(store, shard, identity, data, receipt).rows
    except StoreError as error:
        return kinds[type(error)], str(error), 0
