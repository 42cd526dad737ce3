"""The plan of a rollout: what the store will hold, and which of its shards are still to be done."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from kac.data import open_dataset
from kac.guidance import check_guidance
from kac.model import DATA_CHANGED, load_teacher_config
from kac.util import files
from pipeline.config.specs import RolloutSpec
from pipeline.rollout.teacher import RolloutError
from pipeline.store.layout import Shard, StoreIdentity, parse_shard_name, refuse_other
from pipeline.store.manifest import Extent, Manifest, read_manifest, shards_of, unite_extents
from pipeline.store.receipts import read_notes
from pipeline.store.shards import Receipt, whole_identity


class Plan(NamedTuple):
    """What there is to do."""

    identity: StoreIdentity
    extents: tuple[Extent, ...]  # what the store will hold
    finished: tuple[Receipt, ...]
    todo: tuple[Shard, ...]
    manifest: Manifest | None

    @property
    def rows_finished(self) -> int:
        """Rows that need not be looked at again."""
        return sum(receipt.rows for receipt in self.finished)

    @property
    def is_done(self) -> bool:
        """Whether the store is finished, and holds what is asked for."""
        return not self.todo and self.manifest is not None and self.extents == self.manifest.extents


def make_plan(spec: RolloutSpec) -> Plan:
    """Compare what is asked for with what is there.

    Raises:
        DistillKacError: as ``identify``. StoreError: a store of another identity, or one that a newer version wrote.
    """
    identity = identify(spec)
    listed = files.list_sizes(spec.store)
    manifest, found = read_manifest(spec.store), {name: size for name, size in listed.items() if parse_shard_name(name)}
    refuse_other_store(spec.store, identity, manifest, found)
    ids = (spec.first_sample, spec.first_sample + spec.trajectories)
    asked = [Extent(guidance=w, ids=(ids,)) for w in spec.guidance]
    extents = unite_extents([*(manifest.extents if manifest else ()), *asked])
    sealed = {receipt.name: receipt for receipt in manifest.shards} if manifest else {}
    noted = read_notes(spec.store, identity, listed)
    finished, todo = [], []
    for shard in shards_of(extents, identity.shard_size):
        # Both may know the shard: a short last one that was completed, by a rollout that was stopped.
        receipts = filter(None, (sealed.get(shard.name), noted.get(shard.name)))
        size = found.get(shard.name)
        receipt = next((one for one in receipts if one.rows >= shard.rows and one.bytes == size), None)
        if receipt:
            finished.append(receipt)
        else:
            todo.append(shard)
    return Plan(identity, extents, tuple(finished), tuple(todo), manifest)


def identify(spec: RolloutSpec) -> StoreIdentity:
    """All that the rows of the store depend on.

    Raises:
        DistillKacError: no teacher, one whose data, which a forward rollout starts from, have changed, or guidance of
            one that cannot be guided.
    """
    teacher = load_teacher_config(spec.teacher)
    check_guidance(teacher, spec.guidance)
    if spec.source == "forward":
        found = open_dataset(teacher.data).description.sha256
        if found != teacher.data_sha256:
            expected = f"expected the {teacher.data.kind} that it learned, {teacher.data_sha256[:12]}..."
            found = f"found {found[:12]}...: {DATA_CHANGED}"
            raise RolloutError(f"{spec.teacher}: {expected}, {found}")
    return StoreIdentity.of(spec, teacher)


def refuse_other_store(store: str, wanted: StoreIdentity, manifest: Manifest | None, found: Iterable[str] = ()) -> None:
    """Refuse a store of another identity: that of its manifest or, without one, of the first shard that is whole."""
    of_shards = (whole_identity(store, name) for name in itertools.islice(found, 8))
    here = manifest.identity if manifest else next(filter(None, of_shards), None)
    if here is not None:
        refuse_other(store, wanted, here, "choose another `store`, or the options of this one")
