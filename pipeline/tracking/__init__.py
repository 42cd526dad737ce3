"""MLflow tracking: one experiment, one run per output; fingerprint tags link teacher, store, student and evaluation.

runs.py         start, resume, log to and end a run, from any process
delivery.py     a queue in front of the server, so that a failing server never stops the work (entries, sender, spill)
server.py       the address of the server, and its experiment
metrics.py      the table of metric names
processes.py    which process a run belongs to, and closing the runs of dead processes
source.py       tags for the command, the commit and the data behind a run
system.py       CPU, memory, disk, network and GPU use during a run
"""

from pipeline.tracking.delivery import sync
from pipeline.tracking.metrics import DIAGNOSTIC_PREFIX, METRICS, PART_PREFIX, declare, declared
from pipeline.tracking.processes import close_dead
from pipeline.tracking.runs import (
    FINGERPRINT_TAG,
    INPUT_TAG,
    STAGE_TAG,
    TrackedRun,
    find_runs,
    run_of_output,
    start_run,
)
from pipeline.tracking.server import (
    RUN_FILE,
    connect,
    experiment_name,
    is_refusal,
    tracking_off,
    tracking_uri,
    without_password,
)
from pipeline.tracking.source import Dataset

__all__ = [
    "DIAGNOSTIC_PREFIX",
    "FINGERPRINT_TAG",
    "INPUT_TAG",
    "METRICS",
    "PART_PREFIX",
    "RUN_FILE",
    "STAGE_TAG",
    "Dataset",
    "TrackedRun",
    "close_dead",
    "connect",
    "declare",
    "declared",
    "experiment_name",
    "find_runs",
    "is_refusal",
    "run_of_output",
    "start_run",
    "sync",
    "tracking_off",
    "tracking_uri",
    "without_password",
]
