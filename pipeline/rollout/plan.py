"""The plan of a rollout (the finished store's content, and the missing shards), and the final manifest."""

import itertools
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kac.data import open_dataset
from kac.guidance import check_guidance
from kac.model import DATA_CHANGED, load_teacher_config
from kac.util import files
from pipeline.config import RolloutSpec
from pipeline.rollout.shard_maker import RolloutError, ShardOutcome
from pipeline.store.dataset_card import write_card
from pipeline.store.layout import Shard, StoreIdentity, check_identity, guidance_folder, parse_shard_name
from pipeline.store.manifest import (
    Extent,
    Manifest,
    merge_extents,
    read_manifest,
    read_receipts,
    remove_receipts,
    shards_of,
    write_manifest,
)
from pipeline.store.shards import Receipt, identity_or_none

SEAL_ATTEMPTS = 5

SETTLE_SECONDS = 1.0
"""Within this time, a concurrent job that read the manifest before it was written has written its own to S3."""


class Plan(NamedTuple):
    """The work of a rollout."""

    identity: StoreIdentity
    extents: tuple[Extent, ...]  # samples of the finished store
    finished: tuple[Receipt, ...]
    todo: tuple[Shard, ...]
    manifest: Manifest | None  # of the existing store

    @property
    def rows_finished(self) -> int:
        """The number of rows in finished shards."""
        return sum(receipt.rows for receipt in self.finished)

    @property
    def is_done(self) -> bool:
        """Whether the store is finished and contains the requested samples."""
        return not self.todo and self.manifest is not None and self.extents == self.manifest.extents


def make_plan(spec: RolloutSpec) -> Plan:
    """Compare the requested samples with the existing store.

    Raises:
        DistillKacError: the teacher does not exist or cannot be guided, or a forward rollout would start from data that
            changed since the teacher was trained.
        StoreError: the store has a different identity, or a newer version of this package wrote it.
    """
    teacher = load_teacher_config(spec.teacher)
    check_guidance(teacher, spec.guidance)
    if spec.source == "forward":
        found = open_dataset(teacher.data).description.sha256
        if found != teacher.data_sha256:
            raise RolloutError(
                f"{spec.teacher} was trained on {teacher.data.kind} with sha256 {teacher.data_sha256[:12]}..., but "
                f"the data now has sha256 {found[:12]}.... {DATA_CHANGED}"
            )
    identity = StoreIdentity.of(spec, teacher)
    sizes = files.list_sizes(spec.store)
    manifest = read_manifest(spec.store)
    _check_store(spec.store, identity, manifest, filter(parse_shard_name, sizes))
    ids = (spec.first_sample, spec.first_sample + spec.trajectories)
    requested = [Extent(guidance=w, ids=(ids,)) for w in spec.guidance]
    extents = merge_extents([*(manifest.extents if manifest else ()), *requested])
    sealed = {receipt.name: receipt for receipt in manifest.shards} if manifest else {}
    unsealed = read_receipts(spec.store, identity, sizes)
    finished, todo = [], []
    for shard in shards_of(extents, identity.shard_size):
        # A short last shard has two receipts if a stopped rollout made it longer.
        receipts = filter(None, (sealed.get(shard.name), unsealed.get(shard.name)))
        size = sizes.get(shard.name)
        receipt = next((one for one in receipts if one.rows >= shard.rows and one.bytes == size), None)
        if receipt:
            finished.append(receipt)
        else:
            todo.append(shard)
    return Plan(identity, extents, tuple(finished), tuple(todo), manifest)


def _check_store(store: str, expected: StoreIdentity, manifest: Manifest | None, shards: Iterable[str] = ()) -> None:
    """Raise ``StoreError`` if the store's manifest, or its first intact shard, has a different identity."""
    of_shards = (identity_or_none(store, name) for name in itertools.islice(shards, 8))
    found = manifest.identity if manifest else next(filter(None, of_shards), None)
    if found is not None:
        problem = f"{store} was made with different options"
        check_identity(found, expected, problem, "Choose another `store`, or give the options of this store.")


def seal(spec: RolloutSpec, plan: Plan, outcomes: Iterable[ShardOutcome], rounding: float | None = None) -> Manifest:
    """Write the dataset card and the manifest, then remove receipt files and the temporary files of dead writers.

    A concurrent job may seal other guidance scales of the store. The new manifest is therefore merged with the existing
    manifest, and read again after it is written.

    Args:
        rounding: the rollout's ``endpoint_rms``, or None if it was not computed.

    Raises:
        RolloutError: a planned shard has no receipt, or other jobs keep changing the manifest.
    """
    receipts = (*plan.finished, *(outcome.receipt for outcome in outcomes))
    planned = {shard.name for shard in shards_of(plan.extents, plan.identity.shard_size)}
    missing = planned - {receipt.name for receipt in receipts}
    if missing:
        raise RolloutError(f"{spec.store} cannot be sealed without {min(missing)}. Run the rollout again.")
    class_names = load_teacher_config(spec.teacher).class_names
    for _ in range(SEAL_ATTEMPTS):
        of_card = _merge_manifest(spec, plan, receipts, rounding)
        write_card(spec.store, of_card, class_names, spec.license)
        manifest = _merge_manifest(spec, plan, receipts, rounding)  # read immediately before it is written
        write_manifest(spec.store, manifest)
        if spec.store.startswith("s3://"):
            time.sleep(SETTLE_SECONDS)
        if of_card == manifest == read_manifest(spec.store):
            break
    else:
        raise RolloutError(f"{spec.store}: other jobs keep changing the manifest. Run the rollout again.")
    remove_orphans(spec.store, manifest.guidance)
    return manifest


def _merge_manifest(spec: RolloutSpec, plan: Plan, receipts: Sequence[Receipt], rounding: float | None) -> Manifest:
    """The results of this job, merged with the existing manifest."""
    existing = read_manifest(spec.store)
    _check_store(spec.store, plan.identity, existing)
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
