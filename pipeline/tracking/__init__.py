"""MLflow: one experiment, one run a thing, the chain teacher -> store -> student -> evaluation by fingerprint tags.

metrics.py     the table of metric names
server.py      which server, its experiment, and its address without a password
runs.py        a run: begun or gone on with, written to from any process, ended
delivery.py    what runs log waits in a queue, so that a server that fails costs no work (entries, sender, spill)
processes.py   whose runs these are, and the end of those whose process has died
source.py      the command, the commit and the data behind a run
system.py      processor, memory, disk and GPU while a run lasts
"""

from pipeline.tracking.delivery import sync
from pipeline.tracking.metrics import METRICS, PART_PREFIX, declare, declared
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
from pipeline.tracking.server import RUN_FILE, connect, experiment_name, is_refusal, tracking_uri, without_password
from pipeline.tracking.source import Dataset

__all__ = [
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
    "tracking_uri",
    "without_password",
]
