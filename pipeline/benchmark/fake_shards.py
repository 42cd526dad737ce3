"""Fake shards of one byte each, to measure a store with very many shards without terabytes of data."""

import hashlib
from collections.abc import Sequence

from kac.util import files
from pipeline.config import RolloutSpec
from pipeline.rollout import ShardOutcome
from pipeline.store.layout import Shard, StoreIdentity
from pipeline.store.shards import Receipt

SHARD_BYTES = b"\0"
FILES_PER_CALL = 10_000


class FakeShardMaker:
    """Replaces a ``ShardMaker``. Reports a shard as done without computing it."""

    def __init__(self, spec: RolloutSpec, identity: StoreIdentity) -> None:
        self.spec, self.identity = spec, identity

    def make(self, shard: Shard) -> ShardOutcome:
        """Return the outcome of a fake shard."""
        return outcome_of(shard)


def outcome_of(shard: Shard) -> ShardOutcome:
    """The outcome of a fake shard."""
    return ShardOutcome(
        receipt=receipt_of(shard), computed_rows=shard.rows, compute_seconds=0.1, finished=0.0, peak_memory=None
    )


def receipt_of(shard: Shard) -> Receipt:
    """The receipt of a fake shard. The digest of its name makes it as long and as incompressible as a real receipt."""
    identity = {"name": shard.name, "guidance": shard.guidance, "start": shard.start, "rows": shard.rows}
    return Receipt(**identity, bytes=len(SHARD_BYTES), sha256=hashlib.sha256(shard.name.encode()).hexdigest())


def write_shards(store: str, shards: Sequence[Shard]) -> None:
    """Write a file of one byte for each shard, without fsync."""
    location = files.locate(store)
    for folder in {shard.name.rsplit("/", 1)[0] for shard in shards}:
        location.fs.makedirs((location / folder).path, exist_ok=True)
    for first in range(0, len(shards), FILES_PER_CALL):
        group = shards[first : first + FILES_PER_CALL]
        location.fs.pipe({(location / shard.name).path: SHARD_BYTES for shard in group})
