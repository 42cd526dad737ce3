"""Merge: join stores of one spec, rolled out apart, into one.

Whole shard files are copied, each checked against its receipt on the way; the manifest is written last. A merge that
was stopped is gone on with by the same command.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, NamedTuple, TypeVar

import tyro
from pydantic import field_validator

from kac import files
from pipeline.config import Spec, how
from pipeline.store.layout import Shard, StoreError, StoreIdentity, describe_difference
from pipeline.store.manifest import Contents, Manifest, list_shards, merge_ranges, read_manifest, write_manifest
from pipeline.store.reader import open_store
from pipeline.store.shards import DamagedShard, Receipt, check, identity_of_shard

COPIERS = 8

StorePaths = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="STORE [STORE ...]")]

Item = TypeVar("Item")
Result = TypeVar("Result")


class MergeSpec(Spec):
    """Join finished stores of one spec, with sample ids of their own each, into one."""

    stores: StorePaths = how(..., "endpoint stores to join: paths or s3:// URIs")
    into: Annotated[str, tyro.conf.arg(metavar="STORE")] = how(
        ..., "store to write, new or of an earlier try: a path or s3:// URI"
    )

    @field_validator("stores")
    @classmethod
    def _some(cls, stores: tuple[str, ...]) -> tuple[str, ...]:
        if not stores:
            raise ValueError("expected at least one store")
        return stores


class Source(NamedTuple):
    """A store to be joined."""

    path: str
    manifest: Manifest


class Move(NamedTuple):
    """A shard to be copied."""

    source: str
    shard: Shard
    receipt: Receipt


class Copied(NamedTuple):
    """A shard that is in its place now."""

    receipt: Receipt
    was_there: bool


def merge(spec: MergeSpec) -> Manifest:
    """Copy the shards of all ``spec.stores`` to ``spec.into``, but for those that are there, and seal it.

    Raises:
        StoreError: a source that is unfinished, damaged or of another spec; sample ids that two of them hold; a target
            that holds something else.
        DistillKacError: the target cannot be written to.
    """
    from pipeline import cluster

    into = cluster.absolute(spec.into)
    sources = [_open(cluster.absolute(store)) for store in spec.stores]
    identity = _common_identity(sources)
    contents = join_contents(sources)
    moves = _moves(sources)
    finished = _check_target(into, identity, contents, moves)
    files.check_writable(into)
    copied = _in_threads("copy", lambda move: _copy(into, identity, move, finished.get(move.shard.name)), moves)
    manifest = Manifest(
        fingerprint=identity.fingerprint(),
        spec=identity,
        teacher=sources[0].manifest.teacher,
        contents=contents,
        shards=tuple(done.receipt for done in copied),
    )
    write_manifest(into, manifest)
    rows = sum(part.rows for part in contents)
    kept = sum(done.was_there for done in copied)
    print(f"merge: wrote {into}: {rows:,} rows, {len(copied) - kept} shards copied, {kept} were there", flush=True)
    return manifest


def _open(path: str) -> Source:
    manifest = open_store(path).manifest
    assert manifest is not None  # or it would have been refused as unfinished
    return Source(path, manifest)


def _common_identity(sources: Sequence[Source]) -> StoreIdentity:
    first = sources[0]
    for other in sources[1:]:
        if other.manifest.fingerprint != first.manifest.fingerprint:
            difference = describe_difference(first.manifest.spec, other.manifest.spec)
            raise StoreError(
                f"{other.path}: expected a store of the same spec as {first.path}, found one of another: {difference}: "
                "only stores of one spec can be joined"
            )
    return first.manifest.spec


def join_contents(sources: Sequence[Source]) -> tuple[Contents, ...]:
    """What the joined store holds, by guidance scale.

    Raises:
        StoreError: two sources hold the same sample ids of a guidance scale; the message names them.
    """
    scales = sorted({w for source in sources for w in source.manifest.guidance})
    return tuple(Contents(guidance=w, ids=_join_ranges(sources, w)) for w in scales)


def _join_ranges(sources: Sequence[Source], guidance: float) -> tuple[tuple[int, int], ...]:
    held = sorted((ids, source.path) for source in sources for ids in source.manifest.ids(guidance))
    for ((_, stop), one), ((start, other_stop), other) in itertools.pairwise(held):
        if start < stop:
            raise StoreError(
                f"{other}: expected sample ids that no other store holds, found {start} .. {min(stop, other_stop) - 1} "
                f"of guidance {guidance:g} in {one} too: roll one of them out with another --first-sample"
            )
    return merge_ranges([ids for ids, _ in held])


def _moves(sources: Sequence[Source]) -> list[Move]:
    """Every shard to be copied, in the order of the joined manifest."""
    moves: dict[str, Move] = {}
    for source in sources:
        receipts = {receipt.name: receipt for receipt in source.manifest.shards}
        for shard in source.manifest.plan():
            if shard.name in moves:
                raise StoreError(
                    f"{source.path}: expected shards that no other store has, found {shard.name} in "
                    f"{moves[shard.name].source} too: its ids must start at a multiple of the shard size"
                )
            moves[shard.name] = Move(source.path, shard, receipts[shard.name])
    return sorted(moves.values(), key=lambda move: move.shard)


def _check_target(
    into: str, identity: StoreIdentity, contents: tuple[Contents, ...], moves: Sequence[Move]
) -> dict[str, Receipt]:
    """Refuse a target that holds something else; returns the receipts of its shards that need no second look."""
    manifest, found = read_manifest(into), list_shards(into)
    if manifest is not None:
        _refuse_other(into, identity, manifest.spec)
        if manifest.contents != contents:
            raise StoreError(
                f"{into}: expected a new store, found a finished one that holds other samples than the stores to be "
                "joined: choose another --into, and name it among the stores if it is to be joined too"
            )
        return {receipt.name: receipt for receipt in manifest.shards if found.get(receipt.name) == receipt.bytes}
    unknown = sorted(set(found) - {move.shard.name for move in moves})
    if unknown:
        raise StoreError(
            f"{into}: expected a new store or this merge's own, found {unknown[0]}, which none of the stores to be "
            "joined has: choose another --into, or finish that store and join it too"
        )
    for other in _in_threads("look", lambda name: _identity_or_none(into, name), found):
        if other is not None:
            _refuse_other(into, identity, other)
    return {}


def _refuse_other(into: str, identity: StoreIdentity, found: StoreIdentity) -> None:
    if found != identity:
        raise StoreError(
            f"{into}: expected a new store or one of this spec, found one of another: "
            f"{describe_difference(identity, found)}: choose another --into"
        )


def _identity_or_none(store: str, name: str) -> StoreIdentity | None:
    """A damaged shard says nothing of its store; it is copied again."""
    try:
        return identity_of_shard(store, name)
    except DamagedShard:
        return None


def _copy(into: str, identity: StoreIdentity, move: Move, finished: Receipt | None) -> Copied:
    """Put a shard into the target unless it is there."""
    if finished is not None:
        return Copied(finished, True)
    target = files.join(into, move.shard.name)
    try:
        if _is_there(target, move.receipt.sha256):
            return Copied(move.receipt, True)
        data = files.read_bytes(files.join(move.source, move.shard.name))
        receipt = vouch(move, identity, data)
        files.write_bytes(target, data)
    except OSError as error:
        raise StoreError(f"{move.source}/{move.shard.name}: expected to copy it to {into}, found: {error}") from None
    return Copied(receipt, False)


def _is_there(path: str, sha256: str) -> bool:
    try:
        return _sha256(files.read_bytes(path)) == sha256
    except FileNotFoundError:
        return False


def vouch(move: Move, identity: StoreIdentity, data: bytes) -> Receipt:
    """The receipt for a shard's bytes as they were read: the manifest's, or that of a longer shard that a rollout at
    work has put in the place of a short one.

    Raises:
        StoreError: the bytes are not what was published.
    """
    sha256 = _sha256(data)
    if sha256 == move.receipt.sha256:
        return move.receipt
    advice = f"python -m jobs.store verify {move.source} --repair, then run its rollout again"
    try:
        rows = check(move.source, move.shard, identity, data).num_rows
    except StoreError as error:
        raise StoreError(f"{error}: {advice}") from None
    if not move.receipt.rows < rows <= identity.shard_size:
        raise StoreError(
            f"{move.source}/{move.shard.name}: expected sha256 {move.receipt.sha256[:12]}... as the manifest says, "
            f"found {sha256[:12]}...: {advice}"
        )
    return move.receipt.model_copy(update={"rows": rows, "bytes": len(data), "sha256": sha256})


def _in_threads(title: str, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``work`` of each item in a few threads, in order; the first error ends it all."""
    from tqdm import tqdm

    pending = list(items)
    with ThreadPoolExecutor(max_workers=COPIERS) as pool:
        try:
            return list(tqdm(pool.map(work, pending), desc=title, total=len(pending), unit="shard", disable=None))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
