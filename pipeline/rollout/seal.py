"""Seal a store: once every planned shard has its receipt, write the manifest."""

from collections.abc import Iterable, Sequence

from kac.util import files
from pipeline.config.specs import RolloutSpec
from pipeline.rollout.plan import Plan, refuse_other_store
from pipeline.rollout.shards import Outcome
from pipeline.rollout.teacher import RolloutError
from pipeline.store.layout import guidance_folder
from pipeline.store.manifest import Manifest, read_manifest, shards_of, unite_extents, write_manifest
from pipeline.store.receipts import remove_notes
from pipeline.store.shards import Receipt

ATTEMPTS = 3


def seal(spec: RolloutSpec, plan: Plan, outcomes: Iterable[Outcome], moved: float | None = None) -> Manifest:
    """Write the manifest, then remove what dead writers left.

    Another job may seal other scales of the same store meanwhile: the manifest is united with the one that is there,
    and read back.

    Args:
        moved: the ``endpoint_rms`` of a rollout in another precision than float32.

    Raises:
        RolloutError: a planned shard has no receipt.
    """
    receipts = (*plan.finished, *(outcome.receipt for outcome in outcomes))
    planned = {shard.name for shard in shards_of(plan.extents, plan.identity.shard_size)}
    missing = planned - {receipt.name for receipt in receipts}
    if missing:
        found = f"found none of {min(missing)}: run it again"
        raise RolloutError(f"{spec.store}: expected a receipt of every shard, {found}")
    for _ in range(ATTEMPTS):
        manifest = _unite(spec, plan, receipts, moved)
        write_manifest(spec.store, manifest)
        if _unite(spec, plan, receipts, moved) == manifest:
            break
    remove_orphans(spec.store, manifest.guidance)
    return manifest


def _unite(spec: RolloutSpec, plan: Plan, receipts: Sequence[Receipt], moved: float | None) -> Manifest:
    """The manifest of what this job did and what the store's manifest says by now."""
    now = read_manifest(spec.store)
    refuse_other_store(spec.store, plan.identity, now)
    shards, extents = (now.shards, now.extents) if now else ((), ())
    longest = {receipt.name: receipt for receipt in sorted((*shards, *receipts), key=lambda receipt: receipt.rows)}
    extents = unite_extents([*extents, *plan.extents])
    return Manifest(
        fingerprint=plan.identity.fingerprint(),
        identity=plan.identity,
        teacher=spec.teacher,
        extents=extents,
        endpoint_rms=now.endpoint_rms if now and now.endpoint_rms is not None else moved,
        shards=tuple(longest[shard.name] for shard in shards_of(extents, plan.identity.shard_size)),
    )


def remove_orphans(store: str, scales: Sequence[float]) -> None:
    """Remove the notes that the manifest has made idle, and temporary files of writers on this machine that died."""
    remove_notes(store)
    for folder in (store, *(files.join(store, guidance_folder(w)) for w in scales)):
        files.remove_orphans(folder)
