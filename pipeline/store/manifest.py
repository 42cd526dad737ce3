"""The manifest of a finished store. It is written last, so a store without a manifest is unfinished."""

import json
from collections.abc import Iterable, Sequence

from kac.util import files
from kac.util.options import Options
from pipeline.store.layout import MANIFEST, Shard, StoreError, StoreIdentity, parse_shard_name, plan_shards
from pipeline.store.receipts import is_receipt_file
from pipeline.store.shards import Receipt
from pipeline.store.versions import SCHEMA_VERSION, parse
from pipeline.tracking.server import RUN_FILE

ADVICE = "Delete it and run the rollout again, which keeps all intact shards."

IdRange = tuple[int, int]
"""A half-open range of sample ids: start, stop."""


class Extent(Options):
    """The sample ids that a store contains for one guidance scale."""

    guidance: float
    ids: tuple[IdRange, ...]

    @property
    def rows(self) -> int:
        """The number of sample ids."""
        return sum(stop - start for start, stop in self.ids)


class Manifest(Options):
    """The content of a finished store."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    identity: StoreIdentity
    teacher: str
    endpoint_rms: float | None = None  # RMS error of the endpoints, if the precision is not float32
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
    """Return the manifest of a store, or None if the store has none.

    Raises:
        StoreError: the manifest is damaged, inconsistent or from a newer version.
    """
    where = files.join(store, MANIFEST)
    try:
        raw = files.read_bytes(where)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest = parse(where, Manifest, raw)
    except ValueError as error:
        raise StoreError(f"{where} is not a valid manifest: {str(error).rstrip('.')}. {ADVICE}") from None
    _check_agreement(where, manifest)
    return manifest


def _check_agreement(where: str, manifest: Manifest) -> None:
    if manifest.fingerprint != manifest.identity.fingerprint():
        raise StoreError(
            f"{where} is damaged or was edited: its fingerprint {manifest.fingerprint[:12]}... is not that of its "
            f"identity, {manifest.identity.fingerprint()[:12]}.... {ADVICE}"
        )
    listed = {receipt.name: receipt.rows for receipt in manifest.shards}
    without = [shard.name for shard in manifest.plan() if listed.get(shard.name, 0) < shard.rows]
    if without:
        raise StoreError(f"{where} is damaged or was edited: it has no receipt for all rows of {without[0]}. {ADVICE}")


def write_manifest(store: str, manifest: Manifest) -> None:
    """Write the manifest atomically."""
    values = {**manifest.model_dump(mode="json"), "identity": manifest.identity.values()}
    if manifest.endpoint_rms is None:  # left out for older versions, which do not know the field
        del values["endpoint_rms"]
    files.write_bytes(files.join(store, MANIFEST), json.dumps(values, indent=1).encode())


def list_files(store: str) -> dict[str, int]:
    """Return the size of every file in the store by its name, sorted.

    The manifest, receipt files and the file that names the MLflow run are left out.
    """
    own = {MANIFEST, RUN_FILE}
    sizes = files.list_sizes(store).items()
    return {name: size for name, size in sizes if name not in own and not is_receipt_file(name)}


def list_shards(store: str) -> dict[str, int]:
    """Return the entries of ``list_files`` that are named like shards."""
    return {name: size for name, size in list_files(store).items() if parse_shard_name(name)}


def shards_of(extents: Iterable[Extent], shard_size: int) -> list[Shard]:
    """Split the extents into shards."""
    return [
        shard
        for extent in extents
        for start, stop in extent.ids
        for shard in plan_shards(extent.guidance, range(start, stop), shard_size)
    ]


def merge_extents(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """Merge extents into one per guidance scale, in ascending order."""
    ids: dict[float, list[IdRange]] = {}
    for extent in extents:
        ids.setdefault(extent.guidance, []).extend(extent.ids)
    return tuple(Extent(guidance=w, ids=merge_ranges(ids[w])) for w in sorted(ids))


def merge_ranges(ranges: Sequence[IdRange]) -> tuple[IdRange, ...]:
    """Return the union of id ranges, sorted; ranges that touch or overlap are joined."""
    merged: list[IdRange] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)
