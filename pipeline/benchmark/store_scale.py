"""A store of very many shards: its manifest, its listing, the plan of a rerun, the start of a reader.

Against a tenth of the shards, so that whatever grows faster than they do is seen. Seconds are those of the CPU: these
steps compute, but for the listing, which waits for one answer of S3 after the other, a thousand names in each.
"""

import functools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from kac.util import files
from pipeline.benchmark.made_up import outcome_of, write_shards
from pipeline.benchmark.measurement import Bar, Measurement, interleave
from pipeline.benchmark.setting import Setting
from pipeline.config.specs import RolloutSpec
from pipeline.memory import peak_memory
from pipeline.rollout import make_plan, seal
from pipeline.store.layout import MANIFEST
from pipeline.store.manifest import list_shards, read_manifest
from pipeline.store.order import Order, windows
from pipeline.store.reader import open_store

TENTH = 10
LINEAR_BAR = Bar("<=", 1.5 * TENTH)
"""Of what takes a time: ten times the shards may take ten times as long, and some noise."""

SHARD_ROWS, WINDOW_SHARDS = 1024, 64

Value = TypeVar("Value")


def measure(setting: Setting) -> list[Measurement]:
    """Each figure of ``setting.spec.shards`` shards and of a tenth as many."""
    specs = [store_spec(setting, count) for count in (setting.spec.shards, max(1, setting.spec.shards // TENTH))]
    for spec in specs:
        write_shards(spec.store, make_plan(spec).todo)
    try:
        many, few = interleave(setting.spec.repeats, *(functools.partial(in_new_process, spec) for spec in specs))
    finally:
        for spec in specs:
            files.remove_tree(spec.store)
    return [
        Measurement(
            f"{what}, {setting.spec.shards:,} shards / a tenth",
            unit,
            tuple(figures[what] for figures in many),
            tuple(figures[what] for figures in few),
            LINEAR_BAR if unit == "CPU s" else None,
        )
        for what, unit in UNITS.items()
    ]


UNITS = {
    "list": "CPU s",
    "plan, no manifest": "CPU s",
    "seal": "CPU s",
    "manifest": "bytes",
    "read the manifest": "CPU s",
    "plan, finished": "CPU s",
    "open": "CPU s",
    "order of an epoch": "CPU s",
    "driver's memory": "MiB",
}


def store_spec(setting: Setting, count: int) -> RolloutSpec:
    """A rollout of so many shards."""
    return setting.rollout_spec(f"shards-{count}", trajectories=count * SHARD_ROWS, shard_size=SHARD_ROWS, actors=0)


def in_new_process(spec: RolloutSpec) -> dict[str, float]:
    """``figures`` in a process that holds nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(figures, spec).result()


def figures(spec: RolloutSpec) -> dict[str, float]:
    """What each step of a rollout takes but for the shards themselves, and what a reader's start takes.

    The manifest is removed in the end: the store is then as it was.
    """
    taken: dict[str, float] = {}
    before = peak_memory() or 0

    def timed(what: str, work: Callable[[], Value]) -> Value:
        started = time.process_time()
        value = work()
        taken[what] = time.process_time() - started
        return value

    manifest = files.join(spec.store, MANIFEST)
    try:
        timed("list", lambda: list_shards(spec.store))
        plan = timed("plan, no manifest", lambda: make_plan(spec))
        outcomes = [outcome_of(shard) for shard in plan.todo]
        timed("seal", lambda: seal(spec, plan, outcomes))
        taken["driver's memory"] = ((peak_memory() or 0) - before) / 1024
        taken["manifest"] = len(files.read_bytes(manifest))
        timed("read the manifest", lambda: read_manifest(spec.store))
        timed("plan, finished", lambda: make_plan(spec))
        store = timed("open", lambda: open_store(spec.store))
        order = Order(rank=0, world_size=1, seed=0)
        timed("order of an epoch", lambda: windows(store.shards, order, 0, WINDOW_SHARDS * SHARD_ROWS))
    finally:
        files.remove(manifest)
    return taken
