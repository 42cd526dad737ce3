"""Merge stores with the same identity into one store.

The merge copies all shard files, checks each file against its receipt, and writes the manifest last. If the merge is
stopped, the same command resumes it.
"""

import contextlib
from collections.abc import Collection
from typing import Annotated

from kac.util import files, probes
from kac.util.log import log
from kac.util.options import OptionStyle
from kac.util.path_options import input_path, output_path
from pipeline.cluster import connection as cluster
from pipeline.config import Spec
from pipeline.store.dataset_card import write_card
from pipeline.store.layout import Shard, StoreError, StoreIdentity, check_identity
from pipeline.store.manifest import Extent, Manifest, list_shards, merge_extents, read_manifest, write_manifest
from pipeline.store.reader import open_store
from pipeline.store.shards import Receipt, confirm, identity_or_none, map_in_threads, sha256_of

StorePaths = Annotated[tuple[str, ...], OptionStyle(metavar="STORE", positional=True)]


class MergeSpec(Spec):
    """Merge finished stores that have the same identity and different sample ids."""

    stage = "merge"
    stores: StorePaths = input_path(..., "endpoint stores to merge: paths or s3:// URIs", min_length=1)
    into: Annotated[str, OptionStyle(metavar="STORE")] = output_path(
        ..., "store to write, new or from an earlier attempt: a path or s3:// URI"
    )


def merge(spec: MergeSpec) -> Manifest:
    """Copy the missing shards of all ``spec.stores`` to ``spec.into``, and write its manifest.

    Raises:
        StoreError: a store is unfinished or damaged, or has a different identity; two stores share sample ids; or
            the target has shards that none of the stores has.
        DistillKacError: the target is not writable.
    """
    into = cluster.absolute(spec.into)
    paths = [cluster.absolute(path) for path in spec.stores]
    manifests = [manifest for path in paths if (manifest := open_store(path).manifest)]
    first = manifests[0]
    copies: dict[str, tuple[str, Shard, Receipt]] = {}
    for path, manifest in zip(paths, manifests, strict=True):
        problem, advice = f"{path} cannot be merged with {paths[0]}", "Merge only stores with the same identity."
        check_identity(manifest.identity, first.identity, problem, advice)
        receipts = {receipt.name: receipt for receipt in manifest.shards}
        for shard in manifest.plan():
            if shard.name in copies:  # each id range starts with a new shard, so shards with equal ids have equal names
                samples = f"samples from {shard.start} at guidance {shard.guidance:g}"
                problem = f"{path} and {copies[shard.name][0]} both have {samples}"
                raise StoreError(f"{problem}. Roll out one of the two stores again with a different `first_sample`.")
            copies[shard.name] = path, shard, receipts[shard.name]
    extents = merge_extents(extent for manifest in manifests for extent in manifest.extents)
    _check_target(into, first.identity, extents, copies)
    probes.check_writable(into)
    ordered = sorted(copies.values(), key=lambda copy: copy[1])
    results = map_in_threads(lambda copy: _copy(into, first.identity, *copy), ordered, "copy")
    merged = first.model_copy(update={"extents": extents, "shards": tuple(receipt for receipt, _ in results)})
    write_card(into, merged, like=paths[0])
    write_manifest(into, merged)
    rows, kept = sum(shard.rows for _, shard, _ in ordered), sum(existed for _, existed in results)
    log.info(f"merge: wrote {into}: {rows:,} rows; {len(results) - kept} shards copied, {kept} already existed")
    return merged


def _check_target(into: str, identity: StoreIdentity, extents: tuple[Extent, ...], names: Collection[str]) -> None:
    """Check that the target is new or comes from an earlier attempt at this merge."""
    manifest, found = read_manifest(into), list_shards(into)
    if manifest is not None:
        identities = [manifest.identity]
    else:  # the merge replaces damaged shards, whose identity is unknown
        identities = [*filter(None, map_in_threads(lambda name: identity_or_none(into, name), found, "check"))]
    for other in identities:
        check_identity(other, identity, f"{into} is a different store", "Choose another `into`.")
    if manifest is not None and manifest.extents != extents:
        problem = f"{into} is a finished store with other samples than the stores to merge"
        raise StoreError(f"{problem}. Choose another `into`. To include {into}, list it in `stores`.")
    unknown = sorted(set(found) - set(names))
    if manifest is None and unknown:
        problem = f"{into} is an unfinished store with {unknown[0]}, which is not in the stores to merge"
        raise StoreError(f"{problem}. Choose another `into`, or finish {into} and list it in `stores`.")


def _copy(into: str, identity: StoreIdentity, source: str, shard: Shard, listed: Receipt) -> tuple[Receipt, bool]:
    """Copy a shard to the target; return its receipt, and whether the target already had it."""
    target = files.join(into, shard.name)
    try:
        with contextlib.suppress(FileNotFoundError):
            if sha256_of(files.read_bytes(target)) == listed.sha256:
                return listed, True
        data = files.read_bytes(files.join(source, shard.name))
        # A growing store may already have replaced the listed shard with a longer shard.
        receipt = listed if sha256_of(data) == listed.sha256 else confirm(source, shard, identity, data, listed)
        files.write_bytes(target, data)
    except StoreError as error:
        advice = f"Run `python -m jobs.store verify {source} --repair`, then run its rollout again."
        raise StoreError(f"{error} {advice}") from None
    except OSError as error:
        raise StoreError(f"{source}/{shard.name} cannot be copied to {into}: {error.strerror or error}.") from None
    return receipt, False
