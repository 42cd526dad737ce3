"""Benchmark: what the distribution and the store cost on this machine or cluster, as ratios that hold anywhere.

Both sides of every ratio run in the same process or in processes alike, in turns (A B A B ...), so that what else the
machine does falls on both.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kac import files
from pipeline import cluster
from pipeline.benchmark.measurement import Measurement, machine, table
from pipeline.benchmark.spec import PARTS, BenchmarkSpec

__all__ = ["BenchmarkSpec", "Measurement", "benchmark"]


def benchmark(spec: BenchmarkSpec) -> list[Measurement]:
    """Measure the parts that are asked for, print a table, and write the JSON. A missed bar is no error.

    Raises:
        DistillKacError: the teacher or the scratch folder cannot be used.
    """
    from pipeline.benchmark import kernels, memory, reading, rollout, storage, training
    from pipeline.benchmark.setting import make_setting

    measures: dict[str, Callable[..., list[Measurement]]] = {
        # First, while this process, whose memory is measured, has not yet worked.
        "e": memory.peak_memory,
        "a": rollout.speed,
        "b": training.store_speed,
        "c": reading.bytes_read,
        "d": storage.bytes_stored,
        "f": kernels.process_speed,
        "g": training.online_speed,
    }
    cluster.connect()
    done = []
    with _scratch(spec) as folder:
        setting = make_setting(spec, folder)
        for part in (part for part in measures if part in spec.only):
            print(f"benchmark: ({part}) {PARTS[part]} ...", file=sys.stderr, flush=True)
            done.extend(measures[part](setting))
    done.sort(key=lambda measurement: measurement.part)
    _write(spec, done)
    return done


@contextmanager
def _scratch(spec: BenchmarkSpec) -> Iterator[str]:
    """A folder of this run alone, removed at its end."""
    if spec.folder is None:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            yield folder
        return
    folder = files.join(cluster.absolute(spec.folder), f"benchmark-{os.getpid()}")
    files.check_writable(folder)
    try:
        yield folder
    finally:
        files.remove_tree(folder)


def _write(spec: BenchmarkSpec, done: list[Measurement]) -> None:
    record = {"machine": machine(), "options": spec.model_dump(mode="json"), "measurements": [m.record() for m in done]}
    text = json.dumps(record, indent=2)
    if spec.json_file == "-":
        print(text, flush=True)
        return
    print(table(done), flush=True)
    if spec.json_file:
        files.write_bytes(cluster.absolute(spec.json_file), text.encode())
