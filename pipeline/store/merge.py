"""Merge stores with the same identity into one store.

Shard files are copied, and each is checked against its receipt. The manifest is written last. Running the same command
again finishes a merge that was stopped.
"""

import contextlib
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import field_validator

from kac.util import files, probes
from kac.util.log import log
from kac.util.options import OptionStyle
from kac.util.path_options import input_path, output_path
from pipeline.cluster import connection as cluster
from pipeline.config import Spec
from pipeline.store.layout import Shard, StoreError, StoreIdentity, check_identity
from pipeline.store.manifest import Extent, Manifest, list_shards, merge_extents, read_manifest, write_manifest
from pipeline.store.reader import open_store
from pipeline.store.shards import Receipt, confirm, identity_or_none, sha256_of
from pipeline.store.threads import map_in_threads

StorePaths = Annotated[tuple[str, ...], OptionStyle(metavar="STORE [STORE ...]", positional=True)]


class MergeSpec(Spec):
    """Merge finished stores that have the same identity and different sample ids."""

    stage = "merge"
    stores: StorePaths = input_path(..., "endpoint stores to merge: paths or s3:// URIs")
    into: Annotated[str, OptionStyle(metavar="STORE")] = output_path(
        ..., "store to write, new or from an earlier attempt: a path or s3:// URI"
    )

    @field_validator("stores")
    @classmethod
    def _check_stores(cls, stores: tuple[str, ...]) -> tuple[str, ...]:
        if not stores:
            raise ValueError("Give at least one store.")
        return stores


class ShardCopy(NamedTuple):
    """A shard to copy."""

    source: str
    shard: Shard
    receipt: Receipt


def merge(spec: MergeSpec) -> Manifest:
    """Copy the missing shards of all ``spec.stores`` to ``spec.into``, and write its manifest.

    Raises:
        StoreError: a source is unfinished, damaged or has another identity; two sources have the same sample ids; or
            the target contains other shards.
        DistillKacError: the target is not writable.
    """
    into = cluster.absolute(spec.into)
    sources = [(path, _open(path)) for path in map(cluster.absolute, spec.stores)]
    first, manifest = sources[0]
    identity, teacher = manifest.identity, manifest.teacher
    for path, other in sources[1:]:
        problem = f"{path} cannot be merged with {first}"
        check_identity(other.identity, identity, problem, "Merge only stores with the same identity.")
    copies = _plan_copies(sources)
    extents = merge_extents(extent for _, manifest in sources for extent in manifest.extents)
    finished = _check_target(into, identity, extents, copies)
    probes.check_writable(into)
    results = map_in_threads(lambda copy: _copy(into, identity, copy, finished.get(copy.shard.name)), copies, "copy")
    manifest = Manifest(
        fingerprint=identity.fingerprint(),
        identity=identity,
        teacher=teacher,
        endpoint_rms=sources[0][1].endpoint_rms,
        extents=extents,
        shards=tuple(receipt for receipt, _ in results),
    )
    write_manifest(into, manifest)
    rows = sum(extent.rows for extent in extents)
    kept = sum(existed for _, existed in results)
    log.info(f"merge: wrote {into}: {rows:,} rows; {len(results) - kept} shards copied, {kept} already existed")
    return manifest


def _open(path: str) -> Manifest:
    manifest = open_store(path).manifest
    assert manifest is not None  # open_store refuses an unfinished store
    return manifest


def _plan_copies(sources: Sequence[tuple[str, Manifest]]) -> list[ShardCopy]:
    """Return every shard to copy, in the order of the merged manifest.

    Raises:
        StoreError: two stores have the same sample ids. Id ranges start with a shard, so two shards have the same name.
    """
    copies: dict[str, ShardCopy] = {}
    for path, manifest in sources:
        receipts = {receipt.name: receipt for receipt in manifest.shards}
        for shard in manifest.plan():
            if shard.name in copies:
                raise StoreError(
                    f"{path} and {copies[shard.name].source} both have samples from {shard.start} at guidance "
                    f"{shard.guidance:g}. Roll one of them out with another `first_sample`."
                )
            copies[shard.name] = ShardCopy(path, shard, receipts[shard.name])
    return sorted(copies.values(), key=lambda copy: copy.shard)


def _check_target(
    into: str, identity: StoreIdentity, extents: tuple[Extent, ...], copies: Sequence[ShardCopy]
) -> dict[str, Receipt]:
    """Check that the target is new or from this merge; return the receipts of shards that need no further check."""
    manifest, found = read_manifest(into), list_shards(into)
    problem, advice = f"{into} is a different store", "Choose another `into`."
    if manifest is not None:
        check_identity(manifest.identity, identity, problem, advice)
        if manifest.extents != extents:
            raise StoreError(
                f"{into} is a finished store with other samples than the stores to merge. Choose another `into`, and "
                f"list {into} in `stores` to include it."
            )
        return {receipt.name: receipt for receipt in manifest.shards if found.get(receipt.name) == receipt.bytes}
    unknown = sorted(set(found) - {copy.shard.name for copy in copies})
    if unknown:
        raise StoreError(
            f"{into} is an unfinished store with {unknown[0]}, which is not in the stores to merge. Choose another "
            "`into`, or finish that store and list it in `stores`."
        )
    # A damaged shard has no identity. It is copied again.
    for other in filter(None, map_in_threads(lambda name: identity_or_none(into, name), found, "check")):
        check_identity(other, identity, problem, advice)
    return {}


def _copy(into: str, identity: StoreIdentity, copy: ShardCopy, finished: Receipt | None) -> tuple[Receipt, bool]:
    """Copy a shard to the target; return its receipt, and whether the target already had it."""
    if finished is not None:
        return finished, True
    target = files.join(into, copy.shard.name)
    try:
        with contextlib.suppress(FileNotFoundError):
            if sha256_of(files.read_bytes(target)) == copy.receipt.sha256:
                return copy.receipt, True
        data = files.read_bytes(files.join(copy.source, copy.shard.name))
        receipt = _check_source(copy, identity, data)
        files.write_bytes(target, data)
    except OSError as error:
        raise StoreError(
            f"{copy.source}/{copy.shard.name} cannot be copied to {into}: {error.strerror or error}."
        ) from None
    return receipt, False


def _check_source(copy: ShardCopy, identity: StoreIdentity, data: bytes) -> Receipt:
    """Return the receipt of the bytes, which may be a longer shard than the manifest lists."""
    if sha256_of(data) == copy.receipt.sha256:
        return copy.receipt
    try:
        return confirm(copy.source, copy.shard, identity, data, copy.receipt)
    except StoreError as error:
        raise StoreError(
            f"{error} Run `python -m jobs.store verify {copy.source} --repair`, then run its rollout again."
        ) from None
