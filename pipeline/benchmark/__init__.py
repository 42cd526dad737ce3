"""Benchmark: what the distribution and the store cost on this machine or cluster, as ratios that hold anywhere.

Both sides of every ratio run in the same process or in processes alike, in turns (A B A B ...), so that what else the
machine does falls on both.
"""

import importlib
import json
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from kac.util import files, probes
from kac.util.log import log, progress_log
from kac.util.path_options import check_output
from pipeline.benchmark.measurement import Measurement, machine, table
from pipeline.benchmark.spec import BenchmarkSpec
from pipeline.cluster import connection as cluster

__all__ = ["BenchmarkSpec", "Measurement", "benchmark"]

Done = dict[str, list[Measurement]]
"""What was measured, by part."""


def benchmark(spec: BenchmarkSpec) -> Done:
    """Measure the parts that are asked for, print a table, and write the JSON. A missed bar is no error.

    Raises:
        DistillKacError: the teacher or the scratch folder cannot be used.
    """
    from pipeline.benchmark.setting import make_setting

    cluster.connect()
    done: Done = {}
    with _scratch(spec) as folder:
        setting = make_setting(spec, folder)
        for part in spec.only:
            progress_log.info(f"benchmark: {part} ...")
            done[part] = importlib.import_module(f"{__name__}.{part.replace('-', '_')}").measure(setting)
    _write(spec, done)
    return done


@contextmanager
def _scratch(spec: BenchmarkSpec) -> Iterator[str]:
    """A folder of this run alone, removed at its end."""
    folder = files.join(cluster.absolute(spec.folder or tempfile.gettempdir()), f"benchmark-{uuid.uuid4().hex[:12]}")
    check_output("`folder`", folder, spec)
    probes.check_writable(folder)
    try:
        yield folder
    finally:
        files.remove_tree(folder)


def _write(spec: BenchmarkSpec, done: Done) -> None:
    figures = [{"part": part, **measurement.record()} for part in done for measurement in done[part]]
    record = {"machine": machine(), "options": spec.model_dump(mode="json"), "measurements": figures}
    text = json.dumps(record, indent=2)
    if spec.json_file == "-":
        log.info(text)
        return
    log.info(table(done))
    if spec.json_file:
        files.write_bytes(cluster.absolute(spec.json_file), text.encode())
