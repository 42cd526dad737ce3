"""Streaming: groups of shards read ahead by Ray Data tasks, for columns that do not fit the memory budget."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import ray

from pipeline import cluster
from pipeline.pacing import pause_between_rounds
from pipeline.store.layout import Shard, StoreError, StoreIdentity
from pipeline.store.loading import GROUP_BYTES, Part, read_group

READERS = 2
"""Tasks at once for one reader; each reads some shards at once."""

PAUSE_SECONDS = 0.02

_ERROR = "error"


def read_ahead(
    store: str, spec: StoreIdentity, groups: Sequence[Sequence[Shard]], columns: tuple[str, ...], ahead_bytes: int
) -> Iterator[Part]:
    """The groups of shards in order, read up to about ``ahead_bytes`` ahead.

    Raises:
        StoreError: a shard is missing, damaged or of another store; the message names it.
    """
    if not groups:
        return
    cluster.connect()

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        group = groups[int(batch["item"][0])]
        try:
            return read_group(store, spec, group, columns).table
        except StoreError as error:  # raised here, Ray would wrap it in an error of its own with both stacks
            return pa.table({_ERROR: [str(error)]})

    plan = ray.data.from_items(list(range(len(groups))), override_num_blocks=len(groups))
    # Readers mostly wait for the disk or the network, and where trainers hold every CPU one that asks for a share would
    # wait for ever.
    pool = ray.data.TaskPoolStrategy(size=min(READERS, len(groups)))
    tables = plan.map_batches(read, batch_size=1, batch_format="numpy", num_cpus=0, compute=pool)
    tables.context.enable_progress_bars = False
    pause_between_rounds(tables, PAUSE_SECONDS)
    # By default a block of more than 128 MiB comes in pieces: here a block is a group.
    tables.context.target_max_block_size = None
    options = tables.context.execution_options
    options.preserve_order = True
    # By default a pipeline fills half of the object store, and every worker on a node has one of its own.
    ahead_bytes = max(ahead_bytes, 2 * READERS * GROUP_BYTES)
    options.resource_limits = options.resource_limits.copy(object_store_memory=ahead_bytes)
    blocks = tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    for group, table in zip(groups, blocks, strict=True):
        if table.column_names == [_ERROR]:
            raise StoreError(table[_ERROR][0].as_py())
        yield Part(group, table)
