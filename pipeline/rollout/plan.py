"""The plan of a rollout: the content of the finished store, and the shards that must still be computed."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from kac.data import open_dataset
from kac.guidance import check_guidance
from kac.model import DATA_CHANGED, load_teacher_config
from kac.util import files
from pipeline.config import RolloutSpec
from pipeline.rollout.teacher import RolloutError
from pipeline.store.layout import Shard, StoreIdentity, check_identity, parse_shard_name
from pipeline.store.manifest import Extent, Manifest, merge_extents, read_manifest, shards_of
from pipeline.store.receipts import read_receipts
from pipeline.store.shards import Receipt, identity_or_none


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
        DistillKacError: as ``identify``.
        StoreError: the store has another identity, or a newer version wrote it.
    """
    identity = identify(spec)
    sizes = files.list_sizes(spec.store)
    manifest = read_manifest(spec.store)
    check_store(spec.store, identity, manifest, filter(parse_shard_name, sizes))
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


def identify(spec: RolloutSpec) -> StoreIdentity:
    """Return the identity of the store that the spec asks for.

    Raises:
        DistillKacError: the teacher does not exist or cannot be guided, or a forward rollout would start from data that
            changed since the teacher was trained.
    """
    teacher = load_teacher_config(spec.teacher)
    check_guidance(teacher, spec.guidance)
    if spec.source == "forward":
        found = open_dataset(teacher.data).description.sha256
        if found != teacher.data_sha256:
            raise RolloutError(
                f"{spec.teacher} was trained on {teacher.data.kind} with sha256 {teacher.data_sha256[:12]}..., but "
                f"the data now have {found[:12]}.... {DATA_CHANGED}"
            )
    return StoreIdentity.of(spec, teacher)


def check_store(store: str, expected: StoreIdentity, manifest: Manifest | None, shards: Iterable[str] = ()) -> None:
    """Raise ``StoreError`` if the store has another identity, by its manifest or by its first intact shard."""
    of_shards = (identity_or_none(store, name) for name in itertools.islice(shards, 8))
    found = manifest.identity if manifest else next(filter(None, of_shards), None)
    if found is not None:
        problem = f"{store} was made with other options"
        check_identity(found, expected, problem, "Choose another `store`, or give the options of this store.")
