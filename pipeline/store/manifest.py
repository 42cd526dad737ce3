"""The manifest: what a finished store is. It is written last; a store without one is unfinished."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from kac import files
from kac.errors import DistillKacError
from kac.options import Options
from pipeline.store.layout import (
    DATA,
    MANIFEST,
    SCHEMA_VERSION,
    Shard,
    StoreError,
    StoreIdentity,
    parse_shard_name,
    plan_shards,
)
from pipeline.store.shards import Receipt, check_version

IdRange = tuple[int, int]
"""Sample ids from the first up to, not including, the second."""


class Contents(Options):
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
    spec: StoreIdentity
    teacher: str
    contents: tuple[Contents, ...]
    shards: tuple[Receipt, ...]

    @property
    def guidance(self) -> tuple[float, ...]:
        """The guidance scales in the store."""
        return tuple(part.guidance for part in self.contents)

    def ids(self, guidance: float) -> tuple[IdRange, ...]:
        """The sample ids held of a guidance scale; empty if it is not in the store."""
        return next((part.ids for part in self.contents if part.guidance == guidance), ())

    def plan(self) -> list[Shard]:
        """Every shard that must be there."""
        return shards_of(self.contents, self.spec.shard_size)


def shards_of(contents: Sequence[Contents], shard_size: int) -> list[Shard]:
    """Every shard that holds the contents."""
    return [
        shard
        for part in contents
        for start, stop in part.ids
        for shard in plan_shards(part.guidance, range(start, stop), shard_size)
    ]


@dataclass(frozen=True)
class Entry:
    """A file below a store."""

    name: str
    bytes: int


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
        values = json.loads(raw)
        check_version(where, int(values["schema_version"]))
        manifest = Manifest(**values)
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, DistillKacError) as error:
        raise StoreError(
            f"{where}: expected the manifest of a store, found: {' '.join(str(error).split())[:160]}: "
            "if the shards are whole, delete it and run the rollout again: it adopts them"
        ) from None
    if manifest.fingerprint != manifest.spec.fingerprint():
        raise StoreError(
            f"{where}: expected fingerprint {manifest.spec.fingerprint()[:12]}... of its spec, "
            f"found {manifest.fingerprint[:12]}...: the manifest was changed by hand or damaged"
        )
    listed = {receipt.name: receipt.rows for receipt in manifest.shards}
    without = [shard.name for shard in manifest.plan() if listed.get(shard.name, 0) < shard.rows]
    if without:
        raise StoreError(
            f"{where}: expected a receipt for all rows of each planned shard, found none for {without[0]}: "
            "the manifest was changed by hand or damaged"
        )
    return manifest


def write_manifest(store: str, manifest: Manifest) -> None:
    """Publish the manifest whole."""
    data = json.dumps(manifest.model_dump(mode="json"), indent=1).encode()
    files.write_bytes(files.join(store, MANIFEST), data)


def list_files(store: str) -> list[Entry]:
    """All files below the store's data folder, by name."""
    location = files.locate(files.join(store, DATA))
    try:
        with files.naming(store):
            found = location.fs.find(location.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    base = len(location.path.removesuffix(DATA))
    return sorted((Entry(path[base:], int(info["size"])) for path, info in found.items()), key=lambda entry: entry.name)


def list_shards(store: str) -> dict[str, int]:
    """Name and size of every file that is named like a shard."""
    return {entry.name: entry.bytes for entry in list_files(store) if parse_shard_name(entry.name)}


def merge_ranges(ranges: list[IdRange]) -> tuple[IdRange, ...]:
    """The union of id ranges, sorted, with those that touch or overlap joined."""
    merged: list[IdRange] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)
