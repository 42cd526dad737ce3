"""Benchmark: the cost of distribution and of the store, as ratios that can be compared between machines.

Both sides of a ratio run alternately (A B A B ...), in the same process or in equal processes, so that other load on
the machine affects both.
"""

import json
import os
import platform
import statistics
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kac.util import files, probes
from kac.util.log import log, progress_log
from kac.util.path_options import check_output
from pipeline.benchmark.measurement import BenchmarkSpec, Measurement, make_setting
from pipeline.cluster import connection as cluster

__all__ = ["BenchmarkSpec", "Measurement", "benchmark"]


def benchmark(spec: BenchmarkSpec) -> dict[str, list[Measurement]]:
    """Measure the parts in ``spec.only``, log a table and write the JSON file. A missed bar is not an error.

    Raises:
        DistillKacError: the teacher or the scratch folder cannot be used.
    """
    from pipeline.benchmark.parts import PARTS  # imports Ray

    cluster.connect()
    folder = files.join(cluster.absolute(spec.folder or tempfile.gettempdir()), f"benchmark-{uuid.uuid4().hex[:12]}")
    check_output("`folder`", folder, spec)
    probes.check_writable(folder)
    results: dict[str, list[Measurement]] = {}
    try:
        setting = make_setting(spec, folder)
        for part in (part for part in PARTS if part in spec.only):
            progress_log.info(f"benchmark: measuring {part}")
            results[part] = PARTS[part](setting)
    finally:
        files.remove_tree(folder)
    figures = [{"part": part, **each.record()} for part, measured in results.items() for each in measured]
    record = {"machine": _machine(), "options": spec.model_dump(mode="json"), "measurements": figures}
    text = json.dumps(record, indent=2)
    log.info(text if spec.json_file == "-" else table(results))
    if spec.json_file not in {None, "-"}:
        files.write_bytes(cluster.absolute(spec.json_file), text.encode())
    return results


def _machine() -> dict[str, Any]:
    """The platform, cluster and package versions of the measurements."""
    import pyarrow
    import ray

    return {
        "platform": platform.platform(),
        "cpus_here": os.cpu_count(),
        "cluster": {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")},
        "nodes": len(ray.nodes()),
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in (torch, ray, pyarrow)},
    }


LINE = "{:14} {:54} {:>9} {:>9} {:14} {:>6} {:>16} {:>5} {:>7} {}"
HEAD = ("part", "what", "value", "against", "unit", "ratio", "min..max", "turns", "bar", "")


def table(results: Mapping[str, Sequence[Measurement]]) -> str:
    """The measurements as text, one line each, with medians over all turns."""
    lines: list[tuple[object, ...]] = [HEAD]
    for part, measurements in results.items():
        for m in measurements:
            value, against = (_short(statistics.median(side)) if side else "" for side in (m.values, m.against))
            ratio = f"{statistics.median(m.ratios):.3f}" if m.ratios else ""
            low, high = (f"{end(m.ratios):.3f}" if m.ratios else _short(end(m.values)) for end in (min, max))
            verdict = {True: "holds", False: "missed", None: ""}[m.holds]
            line = (part, m.what, value, against, m.unit, ratio, f"{low}..{high}", len(m.values), m.bar or "", verdict)
            lines.append(line)
    return "\n".join(LINE.format(*line).rstrip() for line in lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
