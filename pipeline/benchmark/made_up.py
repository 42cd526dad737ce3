"""Shards that nobody computed: what a store of very many takes can be measured without its terabytes."""

import hashlib
from collections.abc import Sequence

from kac.util import files
from pipeline.config.specs import RolloutSpec
from pipeline.rollout import Outcome
from pipeline.store.layout import Shard, StoreIdentity
from pipeline.store.shards import Receipt

SHARD_BYTES = b"\0"
FILES_AT_ONCE = 10_000


class NoWork:
    """In the place of a ``ShardMaker``: says at once that a shard is there."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        self.spec, self.identity = spec, identity

    def make(self, shard: Shard) -> Outcome:
        """The outcome as of a shard that was computed."""
        return outcome_of(shard)


def outcome_of(shard: Shard) -> Outcome:
    """What became of a shard of one byte."""
    return Outcome(
        receipt=receipt_of(shard), computed_rows=shard.rows, compute_seconds=0.1, finished=0.0, peak_memory=None
    )


def receipt_of(shard: Shard) -> Receipt:
    """The receipt of a shard of one byte, with the digest of its name: as long as a real one, and as hard to pack."""
    place = {"name": shard.name, "guidance": shard.guidance, "start": shard.start, "rows": shard.rows}
    return Receipt(**place, bytes=len(SHARD_BYTES), sha256=hashlib.sha256(shard.name.encode()).hexdigest())


def write_shards(store: str, shards: Sequence[Shard]) -> None:
    """Files of one byte under the names of the shards; not synced."""
    location = files.locate(store)
    for folder in {shard.name.rsplit("/", 1)[0] for shard in shards}:
        location.fs.makedirs((location / folder).path, exist_ok=True)
    for first in range(0, len(shards), FILES_AT_ONCE):
        some = shards[first : first + FILES_AT_ONCE]
        location.fs.pipe({(location / shard.name).path: SHARD_BYTES for shard in some})
