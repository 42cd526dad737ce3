"""MLflow tracking: one experiment, one run per output; fingerprint tags link teacher, store, student and evaluation.

runs.py             start or resume the run of a stage, end it, and find runs
tracked_run.py      the handle of a run, to which any process can log
process_tags.py     tags of a run's process, and whether the process has ended
dead_runs.py        close the runs of dead processes
metrics.py          the table of metric names
source.py           tags for the command, the commit and the data behind a run
system.py           CPU, memory, disk, network and GPU use during a run
delivery.py         the thread that sends log entries, so that a failing server never stops the work
journal.py          files in which log entries wait until they are sent
entries.py          log entries
sender.py           requests to MLflow from log entries
server.py           the address of the server, and its experiment
logged_models.py    students as logged models, which can be loaded, served and registered
student_pyfunc.py   the code of a logged model
"""

from pipeline.tracking.metrics import DIAGNOSTIC_PREFIX, METRICS, PART_PREFIX, declare, declared
from pipeline.tracking.runs import (
    FINGERPRINT_TAG,
    INPUT_TAG,
    STAGE_TAG,
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
from pipeline.tracking.tracked_run import TrackedRun

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
    "connect",
    "declare",
    "declared",
    "experiment_name",
    "find_runs",
    "is_refusal",
    "run_of_output",
    "start_run",
    "tracking_off",
    "tracking_uri",
    "without_password",
]
