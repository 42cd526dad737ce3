"""Prefetching: Ray Data tasks read groups of shards ahead of the reader, for columns that exceed the memory budget."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from pipeline.cluster import connection as cluster
from pipeline.store.columns import Selection, read_group
from pipeline.store.layout import Shard, StoreError

GROUP_BYTES = 64 << 20
"""Size of the group of shards that one task reads. A larger shard is a group of its own."""

READERS = 2
"""Concurrent tasks per reader. Each task reads the shards of its group in parallel."""

PAUSE_SECONDS = 0.02

_ERROR = "error"


def read_ahead(selection: Selection, groups: Sequence[Sequence[Shard]], ahead_bytes: int) -> Iterator[pa.Table]:
    """Yield the selected columns of each group of shards, in order, prefetching about ``ahead_bytes``.

    Raises:
        StoreError: a shard is missing, damaged or from another store. The message names it.
    """
    if not groups or torch.utils.data.get_worker_info() is not None:
        # A DataLoader worker prefetches by itself. It is a fork of its parent and has no connection to Ray.
        yield from (read_group(selection, group) for group in groups)
        return
    import ray

    from pipeline.cluster.ray_data import each

    cluster.connect()

    columns = replace(selection, shards=())  # a task needs only its own group; fewer bytes to unpack

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        group = [Shard.from_json(text) for text in json.loads(batch["item"][0])]
        try:
            return read_group(columns, group)
        except StoreError as error:  # if raised here, Ray would wrap it in its own error with two stack traces
            return pa.table({_ERROR: [str(error)]})

    # Reading mostly waits for the disk or the network. A task that asked for a CPU would wait indefinitely where
    # trainers hold all CPUs.
    pool = ray.data.TaskPoolStrategy(size=min(READERS, len(groups)))
    count = len(groups)
    items = [json.dumps([shard.to_json() for shard in group]) for group in groups]
    tables = each(items, read, compute=pool, blocks=count, pause_seconds=PAUSE_SECONDS, num_cpus=0)
    # By default Ray Data splits blocks of more than 128 MiB, but here a block must be a whole group.
    tables.context.target_max_block_size = None
    options = tables.context.execution_options
    options.preserve_order = True
    # By default a pipeline fills half of the object store, and every worker on a node has its own pipeline.
    ahead_bytes = max(ahead_bytes, 2 * READERS * GROUP_BYTES)
    options.resource_limits = options.resource_limits.copy(object_store_memory=ahead_bytes)
    blocks = tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    for _, table in zip(groups, blocks, strict=True):
        if table.column_names == [_ERROR]:
            raise StoreError(table[_ERROR][0].as_py())
        yield table
