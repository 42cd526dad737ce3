"""One MLflow run per output. A rerun resumes the run, any process can log to it, and the run is always closed."""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kac.util import files
from kac.util.errors import DistillKacError, one_line, without_keys
from kac.util.options import flatten
from pipeline import claims
from pipeline.config import Spec
from pipeline.tracking import process_tags
from pipeline.tracking.delivery import Delivery, delivery_to
from pipeline.tracking.entries import LOCAL, PARENT_TAG, Entry, RunNotCreatedYet, now
from pipeline.tracking.killed_runs import dead_below, mark_killed
from pipeline.tracking.metrics import SYSTEM_PREFIX
from pipeline.tracking.server import EXPERIMENT_VARIABLE, RUN_FILE, connect, is_refusal, tracking_uri
from pipeline.tracking.tracked_run import LoggedDataset, TrackedRun

STAGE_TAG, FINGERPRINT_TAG, INPUT_TAG = "distillkac.stage", "distillkac.fingerprint", "distillkac.input."
CONTINUES_TAG = "distillkac.continues"

START_SECONDS, NESTED_SECONDS = 60.0, 10.0
"""How long a run and a nested run wait at their start for a server that does not answer, in seconds."""

KILLED_SECONDS = 2.0
"""How long a stopped job waits for the server, in seconds. Ray kills a job three seconds after asking it to stop."""

FIRST_SECONDS, EVERY_SECONDS = 2.0, 10.0
"""Seconds until the first measurement of the machine, and the default of MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL."""


@contextmanager
def start_run(
    *,
    spec: Spec,
    fingerprint: str,
    inputs: dict[str, str],
    output: str,
    parent: TrackedRun | None = None,
    name: str | None = None,
    stage: str | None = None,
    datasets: Sequence[LoggedDataset] = (),
) -> Iterator[TrackedRun]:
    """Start or resume a stage's run, and end the run when the block ends.

    The run ends as FINISHED, as KILLED if the process is asked to stop, or as FAILED after any other error. Then, the
    job releases its claim on ``output``.

    A rerun resumes the run that ``OUTPUT/run.json`` names. If that run was deleted or is on a different server, a new
    run starts, with the tag ``distillkac.continues``.

    Args:
        spec: the options of the stage.
        fingerprint: fingerprint of the output.
        inputs: fingerprint of each input, by the name of the stage that made it.
        output: folder or URI that the stage writes.
        parent: run to nest this run under.
        name: name of the run in MLflow; default: the stage.
        stage: name of the stage to log instead of the spec's stage. The run is then always new and has no ``run.json``.
        datasets: data that the stage reads.

    Raises:
        DistillKacError: the server refuses the run. If the server does not answer, no error is raised.
    """
    run = TrackedRun("", "")
    try:
        if uri := parent.tracking_uri if parent else tracking_uri(output):
            tags = {
                "mlflow.runName": name or stage or spec.stage,
                STAGE_TAG: stage or spec.stage,
                FINGERPRINT_TAG: fingerprint,
                **{f"{INPUT_TAG}{made_by}": value for made_by, value in inputs.items()},
                **process_tags.source_tags(spec.stage),
                **process_tags.tags(),
                **({PARENT_TAG: parent.run_id} if parent else {}),
            }
            run = _open_run(uri, tags, None if stage else output, NESTED_SECONDS if parent else START_SECONDS)
        run.params(flatten(spec.model_dump(mode="json")))
        run.datasets(datasets)
        with _system_metrics(run) if uri and not stage else contextlib.nullcontext():
            yield run
    except (KeyboardInterrupt, SystemExit):
        mark_killed(run)
        run.flush(KILLED_SECONDS)
        raise
    except BaseException:
        run.end("FAILED")
        _deliver(run)
        raise
    else:
        run.end("FINISHED")
        _deliver(run)
    finally:
        if not stage:
            claims.release(output)


def run_of_output(out: str) -> TrackedRun | None:
    """The run that made an output; None if the run is unknown or on another server."""
    record, uri = _read_record(out), tracking_uri(out)
    if record is None or not uri or record["tracking_uri"] != without_keys(uri):
        return None
    return TrackedRun(uri, record["run_id"])


def find_runs(fingerprint: str, stage: str | None = None, uri: str | None = None) -> list[TrackedRun]:
    """The runs whose output has this fingerprint, newest first; an empty list if the server does not answer.

    The default ``uri`` is the ``tracking_uri`` of the current directory.
    """
    uri = uri or tracking_uri(".")
    if not fingerprint or not uri:
        return []
    query = f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'" + (f" and tags.`{STAGE_TAG}` = '{stage}'" if stage else "")
    try:
        client, experiment = delivery_to(uri).sender.connected()
        matches = client.search_runs([experiment], query, order_by=["attributes.start_time DESC"])
    except Exception:  # noqa: BLE001 - MLflow's stores raise errors of any type
        return []
    return [TrackedRun(uri, str(run.info.run_id)) for run in matches]


def _open_run(uri: str, tags: dict[str, str], output: str | None, seconds: float) -> TrackedRun:
    """Resume an output's run, or create a run. Without an output, always create a run."""
    delivery = delivery_to(uri)
    is_up = not delivery.is_failing and _wait_for_server(delivery, seconds)
    if is_up:
        delivery.deliver_leftovers()
    record = _read_record(output) if output else None
    if record is not None and record["fingerprint"] == tags[FINGERPRINT_TAG]:
        if record["tracking_uri"] == without_keys(uri) and not (is_up and _is_gone(delivery, record["run_id"])):
            return _resume(TrackedRun(uri, record["run_id"]), tags, is_up)
        tags = {**tags, CONTINUES_TAG: record["run_id"]}
    run = _create(delivery, tags, is_up)
    if output:
        names = {"tracking_uri": without_keys(uri), "run_id": run.run_id, "fingerprint": tags[FINGERPRINT_TAG]}
        files.write_bytes(files.join(output, RUN_FILE), json.dumps(names, indent=2).encode())
    return run


def _wait_for_server(delivery: Delivery, seconds: float) -> bool:
    """Wait up to ``seconds`` for the server; return whether it answers."""
    deadline, is_reported = time.monotonic() + seconds, False
    while True:
        try:
            connect(delivery.uri)
            return True
        except Exception as error:  # noqa: BLE001 - MLflow's stores raise errors of any type
            _raise_if_refused(delivery.uri, error)
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if not is_reported:
                delivery.warn(f"does not answer ({one_line(error)}): trying for {seconds:.0f} s")
            is_reported = True
            time.sleep(min(1.0, left))


def _raise_if_refused(uri: str, error: Exception) -> None:
    if isinstance(error, DistillKacError):
        raise error
    if is_refusal(error, at_start=True):
        raise DistillKacError(
            f"MLflow cannot use MLFLOW_TRACKING_URI={without_keys(uri)} ({one_line(error)}). Set it to the address of "
            f"a tracking server or a database, or set {EXPERIMENT_VARIABLE} to a different experiment."
        ) from error


def _is_gone(delivery: Delivery, run_id: str) -> bool:
    try:
        client, _ = delivery.sender.connected()
        return bool(client.get_run(delivery.sender.id_of(run_id)).info.lifecycle_stage != "active")
    except RunNotCreatedYet:
        return True
    except Exception as error:  # noqa: BLE001 - MLflow's stores raise errors of any type
        return is_refusal(error)


def _resume(run: TrackedRun, tags: dict[str, str], is_up: bool) -> TrackedRun:
    delivery = delivery_to(run.tracking_uri)
    delivery.put(Entry(run.run_id, "status", {"status": "RUNNING"}))
    run.tags(tags)
    if is_up:
        # If the server fails now, the next start closes these nested runs.
        with contextlib.suppress(Exception):
            for run_id in dead_below(*delivery.sender.connected(), delivery.sender.id_of(run.run_id)):
                mark_killed(TrackedRun(run.tracking_uri, run_id))
            run.flush()
    return run


def _create(delivery: Delivery, tags: dict[str, str], is_up: bool) -> TrackedRun:
    """Create a run now, or later if the server does not answer or has not created the parent's run yet."""
    if is_up and not tags.get(PARENT_TAG, "").startswith(LOCAL):
        try:
            return TrackedRun(delivery.uri, delivery.sender.create(tags, now()))
        except Exception as error:  # noqa: BLE001 - MLflow's stores raise errors of any type
            _raise_if_refused(delivery.uri, error)
    run = TrackedRun(delivery.uri, f"{LOCAL}{uuid.uuid4().hex}")
    delivery.put(Entry(run.run_id, "create", tags))
    return run


def _deliver(run: TrackedRun) -> None:
    """Wait for the server. If it answers, also deliver the entries of dead processes, such as this run's workers."""
    if run.tracking_uri and run.flush():
        delivery_to(run.tracking_uri).deliver_leftovers()


def _read_record(out: str) -> dict[str, str] | None:
    """The content of ``run.json``; None if the file is missing or damaged, because tracking must not stop the work."""
    try:
        record = json.loads(files.read_bytes(files.join(out, RUN_FILE)))
        return {name: str(record[name]) for name in ("tracking_uri", "run_id", "fingerprint")}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _system_metrics(run: TrackedRun) -> Iterator[None]:
    """Log CPU, memory, disk, network and GPU use until the block ends, with MLflow's own monitors and names."""
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

    psutil.cpu_percent()  # each call measures the time since the previous call; the first call returns 0
    monitors = _monitors()
    # A resumed run continues its step numbers.
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
    with contextlib.suppress(Exception):  # if there is no GPU or no NVIDIA library, MLflow may raise any error
        monitors.append(GPUMonitor())
    return monitors
