"""Processor, memory, disk, network and GPU while a run lasts, by MLflow's own monitors and names (``system/...``)."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.tracking.metrics import SYSTEM_PREFIX

FIRST_SECONDS, EVERY_SECONDS = 2.0, 10.0
"""A run that is over sooner has no such metrics; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL is another interval."""


@contextmanager
def system_metrics(log: Callable[[dict[str, float]], None]) -> Iterator[None]:
    """Measure in a thread until the block ends.

    Args:
        log: takes the metrics of one measurement.
    """
    over = threading.Event()
    thread = threading.Thread(target=_measure, args=(log, over), daemon=True, name="system-metrics")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


def _measure(log: Callable[[dict[str, float]], None], over: threading.Event) -> None:
    import os

    every = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or EVERY_SECONDS)
    if over.wait(min(FIRST_SECONDS, every)):
        return
    import psutil

    psutil.cpu_percent()  # the first answer is 0: it measures since the last one
    monitors = _monitors()
    wait = min(1.0, every)
    while not over.wait(wait):
        found: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            found.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        log({f"{SYSTEM_PREFIX}{name}": float(value) for name, value in found.items()})
        wait = every


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except Exception:  # noqa: BLE001 - no library of NVIDIA's, or no GPU, and each says so in its own way
        return monitors
    return monitors
