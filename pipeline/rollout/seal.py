"""Seal a store: write its manifest, after every planned shard is published."""

from collections.abc import Iterable, Sequence

from kac.util import files
from pipeline.config import RolloutSpec
from pipeline.rollout.plan import Plan, check_store
from pipeline.rollout.shard_maker import ShardOutcome
from pipeline.rollout.teacher import RolloutError
from pipeline.store.layout import guidance_folder
from pipeline.store.manifest import Manifest, merge_extents, read_manifest, shards_of, write_manifest
from pipeline.store.receipts import remove_receipts
from pipeline.store.shards import Receipt

ATTEMPTS = 3


def seal(spec: RolloutSpec, plan: Plan, outcomes: Iterable[ShardOutcome], rounding: float | None = None) -> Manifest:
    """Write the manifest, then remove receipt files and the temporary files of dead writers.

    A concurrent job may seal other guidance scales of the store. The new manifest is therefore merged with the existing
    one, and read again after it is written.

    Args:
        rounding: the ``endpoint_rms`` of the rollout, unless its precision is float32.

    Raises:
        RolloutError: a planned shard has no receipt.
    """
    receipts = (*plan.finished, *(outcome.receipt for outcome in outcomes))
    planned = {shard.name for shard in shards_of(plan.extents, plan.identity.shard_size)}
    missing = planned - {receipt.name for receipt in receipts}
    if missing:
        raise RolloutError(f"{spec.store} cannot be sealed without {min(missing)}. Run the rollout again.")
    for _ in range(ATTEMPTS):
        manifest = _make_manifest(spec, plan, receipts, rounding)
        write_manifest(spec.store, manifest)
        if _make_manifest(spec, plan, receipts, rounding) == manifest:
            break
    remove_orphans(spec.store, manifest.guidance)
    return manifest


def _make_manifest(spec: RolloutSpec, plan: Plan, receipts: Sequence[Receipt], rounding: float | None) -> Manifest:
    """Merge the results of this job with the existing manifest."""
    existing = read_manifest(spec.store)
    check_store(spec.store, plan.identity, existing)
    shards, extents = (existing.shards, existing.extents) if existing else ((), ())
    longest = {receipt.name: receipt for receipt in sorted((*shards, *receipts), key=lambda receipt: receipt.rows)}
    extents = merge_extents([*extents, *plan.extents])
    return Manifest(
        fingerprint=plan.identity.fingerprint(),
        identity=plan.identity,
        teacher=spec.teacher,
        extents=extents,
        endpoint_rms=existing.endpoint_rms if existing and existing.endpoint_rms is not None else rounding,
        shards=tuple(longest[shard.name] for shard in shards_of(extents, plan.identity.shard_size)),
    )


def remove_orphans(store: str, scales: Sequence[float]) -> None:
    """Remove receipt files, which a manifest replaces, and temporary files of dead writers on this machine."""
    remove_receipts(store)
    for folder in (store, *(files.join(store, guidance_folder(w)) for w in scales)):
        files.remove_orphans(folder)
