"""The manifest of a finished store, and the receipts of an unfinished store.

The manifest is written last, so a store without a manifest is unfinished. A running rollout writes receipt files at
intervals. A lost receipt costs only time: a rerun must read the complete shard before it accepts the shard.
"""

import json
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence

from kac.util import files
from kac.util.options import Options
from pipeline.store.layout import MANIFEST, SCHEMA_VERSION, Shard, StoreError, StoreIdentity, parse, parse_shard_name
from pipeline.store.shards import Receipt, map_in_threads

ADVICE = "Delete it and run the rollout again, which keeps all intact shards."

SHARDS_PER_RECEIPT_FILE = 500
"""A rerun reads at most this many shards again, plus the shards whose receipts never reached the driver."""

_RECEIPT_FILE = re.compile(r"receipts-[0-9a-f]{12}\.json")

IdRange = tuple[int, int]
"""A half-open range of sample ids: (start, stop)."""


class Extent(Options):
    """The sample ids that a store contains for one guidance scale."""

    guidance: float
    ids: tuple[IdRange, ...]


class Manifest(Options):
    """The content of a finished store."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    identity: StoreIdentity
    teacher: str
    endpoint_rms: float | None = None  # RMS error of the endpoints; None if the precision is float32
    extents: tuple[Extent, ...]
    shards: tuple[Receipt, ...]

    @property
    def guidance(self) -> tuple[float, ...]:
        """The guidance scales in the store."""
        return tuple(extent.guidance for extent in self.extents)

    def ids(self, guidance: float) -> tuple[IdRange, ...]:
        """Return the sample ids of a guidance scale; empty if the scale is not in the store."""
        return next((extent.ids for extent in self.extents if extent.guidance == guidance), ())

    def plan(self) -> list[Shard]:
        """Return every shard that the store must contain."""
        return shards_of(self.extents, self.identity.shard_size)


def read_manifest(store: str) -> Manifest | None:
    """Return the manifest, or None if it is missing. Raises ``StoreError`` if it is damaged or from a newer version."""
    where = files.join(store, MANIFEST)
    try:
        manifest = parse(where, Manifest, files.read_bytes(where))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise StoreError(f"{where} is not a valid manifest: {str(error).rstrip('.')}. {ADVICE}") from None
    listed = {receipt.name: receipt.rows for receipt in manifest.shards}
    without = [shard.name for shard in manifest.plan() if listed.get(shard.name, 0) < shard.rows]
    if manifest.fingerprint != manifest.identity.fingerprint():
        problem = f"its fingerprint {manifest.fingerprint[:12]}... does not match its identity"
    elif without:
        problem = f"it has no receipt for all rows of {without[0]}"
    else:
        return manifest
    raise StoreError(f"{where} is damaged or was edited: {problem}. {ADVICE}")


def write_manifest(store: str, manifest: Manifest) -> None:
    """Write the manifest atomically."""
    values = {**manifest.model_dump(mode="json"), "identity": manifest.identity.values()}
    if manifest.endpoint_rms is None:  # left out, because older versions do not know the field
        del values["endpoint_rms"]
    files.write_bytes(files.join(store, MANIFEST), json.dumps(values, indent=1).encode())


class ReceiptFile(Options):
    """Receipts of published shards."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    shards: tuple[Receipt, ...]


def is_receipt_file(name: str) -> bool:
    """Return whether a path relative to the store names a receipt file."""
    return _RECEIPT_FILE.fullmatch(name) is not None


def write_receipts(store: str, identity: StoreIdentity, receipts: Sequence[Receipt]) -> None:
    """Write a new receipt file."""
    content = ReceiptFile(fingerprint=identity.fingerprint(), shards=tuple(receipts))
    name = f"receipts-{uuid.uuid4().hex[:12]}.json"
    files.write_bytes(files.join(store, name), json.dumps(content.model_dump(mode="json")).encode())


def read_receipts(store: str, identity: StoreIdentity, names: Iterable[str]) -> dict[str, Receipt]:
    """Read the receipt files among ``names``, and return their receipts by shard name.

    Ignores files that are damaged, missing or from another store, and shards whose receipts contradict each other.
    """

    def read(name: str) -> tuple[Receipt, ...]:
        where = files.join(store, name)
        try:
            content = parse(where, ReceiptFile, files.read_bytes(where))
        except (FileNotFoundError, StoreError, ValueError):
            return ()
        return content.shards if content.fingerprint == identity.fingerprint() else ()

    found: dict[str, set[Receipt]] = defaultdict(set)
    for receipts in map_in_threads(read, filter(is_receipt_file, names)):
        for receipt in receipts:
            found[receipt.name].add(receipt)
    return {name: receipts.pop() for name, receipts in found.items() if len(receipts) == 1}


def remove_receipts(store: str) -> None:
    """Remove the receipt files of a finished store."""
    for name in filter(is_receipt_file, files.names_in(store)):
        files.remove(files.join(store, name))


def list_shards(store: str) -> dict[str, int]:
    """Return the sizes of all files that are named like shards, by name in sorted order."""
    return {name: size for name, size in files.list_sizes(store).items() if parse_shard_name(name)}


def shards_of(extents: Iterable[Extent], shard_size: int) -> list[Shard]:
    """Split the extents into shards."""
    return [
        shard
        for extent in extents
        for start, stop in extent.ids
        for shard in plan_shards(extent.guidance, range(start, stop), shard_size)
    ]


def plan_shards(guidance: float, ids: range, shard_size: int) -> list[Shard]:
    """Split ``ids``, which must start at a multiple of ``shard_size``, into shards. The last shard may be short."""
    return [
        Shard(guidance, start // shard_size, start, min(shard_size, ids.stop - start))
        for start in range(ids.start, ids.stop, shard_size)
    ]


def merge_extents(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """Merge all extents of a guidance scale into one. The scales are in ascending order."""
    ids: dict[float, list[IdRange]] = defaultdict(list)
    for extent in extents:
        ids[extent.guidance] += extent.ids
    return tuple(Extent(guidance=w, ids=merge_ranges(ids[w])) for w in sorted(ids))


def merge_ranges(ranges: Iterable[IdRange]) -> tuple[IdRange, ...]:
    """Return the union of id ranges in ascending order. Ranges that touch or overlap are joined."""
    merged: list[IdRange] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)
