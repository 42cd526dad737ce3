"""Prefetch: groups of shards read ahead by Ray Data tasks, for columns that do not fit the memory budget."""

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
"""What a task reads in one go; a larger shard is read whole."""

READERS = 2
"""Tasks at once for one reader; each reads some shards at once."""

PAUSE_SECONDS = 0.02

_ERROR = "error"


def read_ahead(selection: Selection, groups: Sequence[Sequence[Shard]], ahead_bytes: int) -> Iterator[pa.Table]:
    """The selected columns of the groups of shards, in order, read up to about ``ahead_bytes`` ahead.

    Raises:
        StoreError: a shard is missing, damaged or of another store; the message names it.
    """
    if not groups or torch.utils.data.get_worker_info() is not None:
        # A DataLoader's worker process reads ahead by itself; a fork of its parent, it has no connection to Ray.
        yield from (read_group(selection, group) for group in groups)
        return
    import ray

    from pipeline.cluster.ray_data import each

    cluster.connect()

    columns = replace(selection, shards=())  # a task unpacks what it reads by, and needs its own group alone

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        group = [Shard.of_text(text) for text in json.loads(batch["item"][0])]
        try:
            return read_group(columns, group)
        except StoreError as error:  # raised here, Ray would wrap it in an error of its own with both stacks
            return pa.table({_ERROR: [str(error)]})

    # Readers mostly wait for the disk or the network, and where trainers hold every CPU one that asks for a share would
    # wait for ever.
    pool = ray.data.TaskPoolStrategy(size=min(READERS, len(groups)))
    count = len(groups)
    items = [json.dumps([shard.as_text() for shard in group]) for group in groups]
    tables = each(items, read, compute=pool, blocks=count, pause_seconds=PAUSE_SECONDS, num_cpus=0)
    # By default a block of more than 128 MiB comes in pieces: here a block is a group.
    tables.context.target_max_block_size = None
    options = tables.context.execution_options
    options.preserve_order = True
    # By default a pipeline fills half of the object store, and every worker on a node has one of its own.
    ahead_bytes = max(ahead_bytes, 2 * READERS * GROUP_BYTES)
    options.resource_limits = options.resource_limits.copy(object_store_memory=ahead_bytes)
    blocks = tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    for _, table in zip(groups, blocks, strict=True):
        if table.column_names == [_ERROR]:
            raise StoreError(table[_ERROR][0].as_py())
        yield table
