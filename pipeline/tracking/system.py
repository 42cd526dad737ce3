"""Log CPU, memory, disk, network and GPU use during a run, with MLflow's own monitors and names (``system/...``)."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.tracking.metrics import SYSTEM_PREFIX
from pipeline.tracking.tracked_run import TrackedRun

FIRST_SECONDS, EVERY_SECONDS = 2.0, 10.0
"""When measuring begins, and the default of MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL. Shorter runs log none."""


@contextmanager
def system_metrics(run: TrackedRun) -> Iterator[None]:
    """Measure in a thread until the block ends. The steps continue those of a resumed run."""
    ended = threading.Event()
    thread = threading.Thread(target=_measure, args=(run, ended), daemon=True, name="system-metrics")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5)


def _measure(run: TrackedRun, ended: threading.Event) -> None:
    every = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or EVERY_SECONDS)
    if ended.wait(min(FIRST_SECONDS, every)):
        return
    import psutil

    psutil.cpu_percent()  # measures since the previous call; the first call returns 0
    monitors = _monitors()
    step, wait = run.last_step(f"{SYSTEM_PREFIX}cpu_utilization_percentage"), min(1.0, every)
    while not ended.wait(wait):
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        step, wait = step + 1, every
        run.metrics({f"{SYSTEM_PREFIX}{name}": value for name, value in values.items()}, step)


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(Exception):  # without a GPU or NVIDIA's library, the error is of any type
        monitors.append(GPUMonitor())
    return monitors
