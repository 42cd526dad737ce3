"""A store with very many shards: its listing, its manifest, the plan of a rerun, and the start of a reader.

Each cost is compared with that of a tenth of the shards, which reveals costs that grow faster than the number of
shards. Times are CPU times. They omit the wait for S3, which lists a thousand names per request.
"""

import functools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from kac.util import files
from pipeline.benchmark.fake_shards import outcome_of, write_shards
from pipeline.benchmark.measurement import Bar, Measurement, interleave
from pipeline.benchmark.setting import Setting
from pipeline.config import RolloutSpec
from pipeline.memory import peak_memory
from pipeline.rollout import make_plan, seal
from pipeline.store.layout import MANIFEST
from pipeline.store.manifest import list_shards, read_manifest
from pipeline.store.order import Order, windows
from pipeline.store.reader import open_store

TENTH = 10
LINEAR_BAR = Bar("<=", 1.5 * TENTH)
"""For CPU times: ten times the shards may take ten times as long, plus noise."""

SHARD_ROWS, WINDOW_SHARDS = 1024, 64

Value = TypeVar("Value")


def measure(setting: Setting) -> list[Measurement]:
    """Measure ``setting.spec.shards`` shards and a tenth of that number."""
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
            tuple(each[what] for each in many),
            tuple(each[what] for each in few),
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
    """The spec of a rollout with ``count`` shards."""
    return setting.rollout_spec(f"shards-{count}", trajectories=count * SHARD_ROWS, shard_size=SHARD_ROWS, actors=0)


def in_new_process(spec: RolloutSpec) -> dict[str, float]:
    """Call ``costs`` in a new process, so that its peak memory is meaningful."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(costs, spec).result()


def costs(spec: RolloutSpec) -> dict[str, float]:
    """The costs of each step of a rollout, except for the shards, and of the start of a reader; see ``UNITS``.

    The manifest is removed at the end, which restores the store.
    """
    measured: dict[str, float] = {}
    before = peak_memory() or 0

    def timed(what: str, work: Callable[[], Value]) -> Value:
        started = time.process_time()
        value = work()
        measured[what] = time.process_time() - started
        return value

    manifest = files.join(spec.store, MANIFEST)
    try:
        timed("list", lambda: list_shards(spec.store))
        plan = timed("plan, no manifest", lambda: make_plan(spec))
        outcomes = [outcome_of(shard) for shard in plan.todo]
        timed("seal", lambda: seal(spec, plan, outcomes))
        measured["driver's memory"] = ((peak_memory() or 0) - before) / 1024
        measured["manifest"] = len(files.read_bytes(manifest))
        timed("read the manifest", lambda: read_manifest(spec.store))
        timed("plan, finished", lambda: make_plan(spec))
        store = timed("open", lambda: open_store(spec.store))
        order = Order(rank=0, world_size=1, seed=0)
        timed("order of an epoch", lambda: windows(store.shards, order, 0, WINDOW_SHARDS * SHARD_ROWS))
    finally:
        files.remove(manifest)
    return measured
