"""Benchmark: the cost of distribution and of the store, as ratios that can be compared between machines.

Both sides of a ratio run alternately (A B A B ...), in the same process or in equal processes, so that other load on
the machine affects both.
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

Results = dict[str, list[Measurement]]
"""The measurements of each part."""


def benchmark(spec: BenchmarkSpec) -> Results:
    """Measure the parts in ``spec.only``, log a table and write the JSON file. A missed bar is not an error.

    Raises:
        DistillKacError: the teacher or the scratch folder cannot be used.
    """
    from pipeline.benchmark.setting import make_setting

    cluster.connect()
    results: Results = {}
    with _scratch(spec) as folder:
        setting = make_setting(spec, folder)
        for part in spec.only:
            progress_log.info(f"benchmark: measuring {part}")
            results[part] = importlib.import_module(f"{__name__}.{part.replace('-', '_')}").measure(setting)
    _write(spec, results)
    return results


@contextmanager
def _scratch(spec: BenchmarkSpec) -> Iterator[str]:
    """A new folder for this run, removed at its end."""
    folder = files.join(cluster.absolute(spec.folder or tempfile.gettempdir()), f"benchmark-{uuid.uuid4().hex[:12]}")
    check_output("`folder`", folder, spec)
    probes.check_writable(folder)
    try:
        yield folder
    finally:
        files.remove_tree(folder)


def _write(spec: BenchmarkSpec, results: Results) -> None:
    figures = [{"part": part, **measurement.record()} for part in results for measurement in results[part]]
    record = {"machine": machine(), "options": spec.model_dump(mode="json"), "measurements": figures}
    text = json.dumps(record, indent=2)
    if spec.json_file == "-":
        log.info(text)
        return
    log.info(table(results))
    if spec.json_file:
        files.write_bytes(cluster.absolute(spec.json_file), text.encode())
