"""The manifest: what a finished store is. It is written last; a store without one is unfinished."""

import json
from collections.abc import Iterable, Sequence

from kac.util import files
from kac.util.options import Options
from pipeline.store.layout import MANIFEST, Shard, StoreError, StoreIdentity, parse_shard_name, plan_shards
from pipeline.store.receipts import is_note
from pipeline.store.shards import Receipt
from pipeline.store.versions import SCHEMA_VERSION, parse
from pipeline.tracking.server import RUN_FILE

IdRange = tuple[int, int]
"""Sample ids from the first up to, not including, the second."""


class Extent(Options):
    """The sample ids that a store holds of one guidance scale."""

    guidance: float
    ids: tuple[IdRange, ...]

    @property
    def rows(self) -> int:
        """How many there are."""
        return sum(stop - start for start, stop in self.ids)


class Manifest(Options):
    """A finished store."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    identity: StoreIdentity
    teacher: str
    endpoint_rms: float | None = None  # how far another precision than float32 moves the ends of trajectories
    extents: tuple[Extent, ...]
    shards: tuple[Receipt, ...]

    @property
    def guidance(self) -> tuple[float, ...]:
        """The guidance scales in the store."""
        return tuple(extent.guidance for extent in self.extents)

    def ids(self, guidance: float) -> tuple[IdRange, ...]:
        """The sample ids held of a guidance scale; empty if it is not in the store."""
        return next((extent.ids for extent in self.extents if extent.guidance == guidance), ())

    def plan(self) -> list[Shard]:
        """Every shard that must be there."""
        return shards_of(self.extents, self.identity.shard_size)


def read_manifest(store: str) -> Manifest | None:
    """The store's manifest, or None if there is none.

    Raises:
        StoreError: a damaged manifest, one of a newer version, or one that contradicts itself.
    """
    where = files.join(store, MANIFEST)
    try:
        raw = files.read_bytes(where)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest = parse(where, Manifest, raw)
    except ValueError as error:
        raise StoreError(
            f"{where}: expected the manifest of a store, found {error}: "
            "if the shards are whole, delete it and run the rollout again: it adopts them"
        ) from None
    _check_agreement(where, manifest)
    return manifest


def _check_agreement(where: str, manifest: Manifest) -> None:
    if manifest.fingerprint != manifest.identity.fingerprint():
        raise StoreError(
            f"{where}: expected fingerprint {manifest.identity.fingerprint()[:12]}... of its identity, "
            f"found {manifest.fingerprint[:12]}...: the manifest was changed by hand or damaged"
        )
    listed = {receipt.name: receipt.rows for receipt in manifest.shards}
    without = [shard.name for shard in manifest.plan() if listed.get(shard.name, 0) < shard.rows]
    if without:
        raise StoreError(
            f"{where}: expected a receipt for all rows of each planned shard, found none for {without[0]}: "
            "the manifest was changed by hand or damaged"
        )


def write_manifest(store: str, manifest: Manifest) -> None:
    """Publish the manifest whole."""
    values = {**manifest.model_dump(mode="json"), "identity": manifest.identity.values()}
    if manifest.endpoint_rms is None:  # versions that do not know it read the rest
        del values["endpoint_rms"]
    files.write_bytes(files.join(store, MANIFEST), json.dumps(values, indent=1).encode())


def list_files(store: str) -> dict[str, int]:
    """Name and size of every file below the store except its manifest, what was noted for it, and the name of its run,
    sorted by name."""
    own = {MANIFEST, RUN_FILE}
    return {name: size for name, size in files.list_sizes(store).items() if name not in own and not is_note(name)}


def list_shards(store: str) -> dict[str, int]:
    """Those of ``list_files`` that are named like a shard."""
    return {name: size for name, size in list_files(store).items() if parse_shard_name(name)}


def shards_of(extents: Iterable[Extent], shard_size: int) -> list[Shard]:
    """Every shard that holds the extents."""
    return [
        shard
        for extent in extents
        for start, stop in extent.ids
        for shard in plan_shards(extent.guidance, range(start, stop), shard_size)
    ]


def unite_extents(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """One extent for each guidance scale, ascending."""
    ids: dict[float, list[IdRange]] = {}
    for extent in extents:
        ids.setdefault(extent.guidance, []).extend(extent.ids)
    return tuple(Extent(guidance=w, ids=merge_ranges(ids[w])) for w in sorted(ids))


def merge_ranges(ranges: Sequence[IdRange]) -> tuple[IdRange, ...]:
    """The union of id ranges, sorted, with those that touch or overlap joined."""
    merged: list[IdRange] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)
