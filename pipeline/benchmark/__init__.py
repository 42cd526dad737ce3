"""Benchmark: the cost of distribution and of the store, as ratios that can be compared between machines.

Both sides of a ratio run alternately (A B A B ...), in the same process or in equal processes, so that other load on
the machine affects both.
"""

import json
import tempfile
import uuid

from kac.util import files, probes
from kac.util.log import log, progress_log
from kac.util.path_options import check_output
from pipeline.benchmark.measurement import Measurement, machine, table
from pipeline.benchmark.setting import BenchmarkSpec, make_setting
from pipeline.cluster import connection as cluster

__all__ = ["BenchmarkSpec", "Measurement", "benchmark"]


def benchmark(spec: BenchmarkSpec) -> dict[str, list[Measurement]]:
    """Measure the parts in ``spec.only``, log a table and write the JSON file. A missed bar is not an error.

    Raises:
        DistillKacError: the teacher or the scratch folder cannot be used.
    """
    from pipeline.benchmark import rollout_parts, store_parts

    measures = {  # in order; the first part measures the memory of this process
        "peak-memory": rollout_parts.measure_peak_memory,
        "rollout-speed": rollout_parts.measure_rollout_speed,
        "distill-speed": store_parts.measure_distill_speed,
        "bytes-read": store_parts.measure_bytes_read,
        "bytes-stored": store_parts.measure_bytes_stored,
        "online-speed": store_parts.measure_online_speed,
    }
    cluster.connect()
    folder = files.join(cluster.absolute(spec.folder or tempfile.gettempdir()), f"benchmark-{uuid.uuid4().hex[:12]}")
    check_output("`folder`", folder, spec)
    probes.check_writable(folder)
    results: dict[str, list[Measurement]] = {}
    try:
        setting = make_setting(spec, folder)
        for part in (part for part in measures if part in spec.only):
            progress_log.info(f"benchmark: measuring {part}")
            results[part] = measures[part](setting)
    finally:
        files.remove_tree(folder)
    figures = [{"part": part, **each.record()} for part, measured in results.items() for each in measured]
    record = {"machine": machine(), "options": spec.model_dump(mode="json"), "measurements": figures}
    text = json.dumps(record, indent=2)
    log.info(text if spec.json_file == "-" else table(results))
    if spec.json_file not in {None, "-"}:
        files.write_bytes(cluster.absolute(spec.json_file), text.encode())
    return results
