"""Merge: join stores of one identity, rolled out apart, into one.

Whole shard files are copied, each checked against its receipt on the way; the manifest is written last. A merge that
was stopped is finished by the same command.
"""

import contextlib
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import tyro
from pydantic import field_validator

from kac.util import files, probes
from kac.util.log import log
from kac.util.path_options import input_path, output_path
from pipeline.cluster import connection as cluster
from pipeline.config.specs import Spec
from pipeline.store.layout import Shard, StoreError, StoreIdentity, refuse_other
from pipeline.store.manifest import Extent, Manifest, list_shards, read_manifest, unite_extents, write_manifest
from pipeline.store.reader import open_store
from pipeline.store.shards import Receipt, confirm, sha256_of, whole_identity
from pipeline.store.threads import in_threads

StorePaths = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="STORE [STORE ...]")]


class MergeSpec(Spec):
    """Join finished stores of one identity, which have no sample ids in common, into one."""

    stage = "merge"
    stores: StorePaths = input_path(..., "endpoint stores to join: paths or s3:// URIs")
    into: Annotated[str, tyro.conf.arg(metavar="STORE")] = output_path(
        ..., "store to write, new or of an earlier try: a path or s3:// URI"
    )

    @field_validator("stores")
    @classmethod
    def _some(cls, stores: tuple[str, ...]) -> tuple[str, ...]:
        if not stores:
            raise ValueError("expected at least one store")
        return stores


class Move(NamedTuple):
    """A shard to be copied."""

    source: str
    shard: Shard
    receipt: Receipt


def merge(spec: MergeSpec) -> Manifest:
    """Copy the shards of all ``spec.stores`` to ``spec.into``, but for those that are there, and seal it.

    Raises:
        StoreError: a source that is unfinished, damaged or of another identity; sample ids that two of them hold; a
            target that holds something else.
        DistillKacError: the target cannot be written to.
    """
    into = cluster.absolute(spec.into)
    sources = [(path, _open(path)) for path in map(cluster.absolute, spec.stores)]
    first, manifest = sources[0]
    identity, teacher = manifest.identity, manifest.teacher
    for path, other in sources[1:]:
        same = f"a store of the same identity as {first}"
        refuse_other(path, identity, other.identity, "only stores of one identity can be joined", same)
    moves = _moves(sources)
    extents = unite_extents(extent for _, manifest in sources for extent in manifest.extents)
    finished = _check_target(into, identity, extents, moves)
    probes.check_writable(into)
    copied = in_threads(lambda move: _copy(into, identity, move, finished.get(move.shard.name)), moves, "copy")
    manifest = Manifest(
        fingerprint=identity.fingerprint(),
        identity=identity,
        teacher=teacher,
        endpoint_rms=sources[0][1].endpoint_rms,
        extents=extents,
        shards=tuple(receipt for receipt, _ in copied),
    )
    write_manifest(into, manifest)
    rows = sum(extent.rows for extent in extents)
    kept = sum(was_there for _, was_there in copied)
    log.info(f"merge: wrote {into}: {rows:,} rows, {len(copied) - kept} shards copied, {kept} were there")
    return manifest


def _open(path: str) -> Manifest:
    manifest = open_store(path).manifest
    assert manifest is not None  # or it would have been refused as unfinished
    return manifest


def _moves(sources: Sequence[tuple[str, Manifest]]) -> list[Move]:
    """Every shard to be copied, in the order of the joined manifest.

    Raises:
        StoreError: two stores hold the same sample ids, and so a shard of the same name: ids start with a shard.
    """
    moves: dict[str, Move] = {}
    for path, manifest in sources:
        receipts = {receipt.name: receipt for receipt in manifest.shards}
        for shard in manifest.plan():
            if shard.name in moves:
                raise StoreError(
                    f"{path}: expected sample ids that no other store holds, found those from {shard.start} on of "
                    f"guidance {shard.guidance:g} in {moves[shard.name].source} too: "
                    "roll one of them out with another `first_sample`"
                )
            moves[shard.name] = Move(path, shard, receipts[shard.name])
    return sorted(moves.values(), key=lambda move: move.shard)


def _check_target(
    into: str, identity: StoreIdentity, extents: tuple[Extent, ...], moves: Sequence[Move]
) -> dict[str, Receipt]:
    """Refuse a target that holds something else; returns the receipts of its shards that need no second look."""
    manifest, found, advice = read_manifest(into), list_shards(into), "choose another `into`"
    if manifest is not None:
        refuse_other(into, identity, manifest.identity, advice)
        if manifest.extents != extents:
            raise StoreError(
                f"{into}: expected a new store, found a finished one that holds other samples than the stores to be "
                f"joined: {advice}, and name it among the stores if it is to be joined too"
            )
        return {receipt.name: receipt for receipt in manifest.shards if found.get(receipt.name) == receipt.bytes}
    unknown = sorted(set(found) - {move.shard.name for move in moves})
    if unknown:
        raise StoreError(
            f"{into}: expected a new store or this merge's own, found {unknown[0]}, which none of the stores to be "
            f"joined has: {advice}, or finish that store and join it too"
        )
    # A damaged shard there is copied again.
    for other in filter(None, in_threads(lambda name: whole_identity(into, name), found, "look")):
        refuse_other(into, identity, other, advice)
    return {}


def _copy(into: str, identity: StoreIdentity, move: Move, finished: Receipt | None) -> tuple[Receipt, bool]:
    """Put a shard into the target; returns its receipt, and whether it was there."""
    if finished is not None:
        return finished, True
    target = files.join(into, move.shard.name)
    try:
        with contextlib.suppress(FileNotFoundError):
            if sha256_of(files.read_bytes(target)) == move.receipt.sha256:
                return move.receipt, True
        data = files.read_bytes(files.join(move.source, move.shard.name))
        receipt = _receipt(move, identity, data)
        files.write_bytes(target, data)
    except OSError as error:
        raise StoreError(f"{move.source}/{move.shard.name}: expected to copy it to {into}, found: {error}") from None
    return receipt, False


def _receipt(move: Move, identity: StoreIdentity, data: bytes) -> Receipt:
    if sha256_of(data) == move.receipt.sha256:
        return move.receipt
    try:
        return confirm(move.source, move.shard, identity, data, move.receipt)
    except StoreError as error:
        advice = f"python -m jobs.store verify {move.source} --repair, then run its rollout again"
        raise StoreError(f"{error}: {advice}") from None
