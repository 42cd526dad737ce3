"""MLflow tracking: one experiment, one run per output; fingerprint tags link teacher, store, student and evaluation.

runs.py             start or resume the run of a stage, measure the machine, end the run, and find runs
tracked_run.py      a handle of a run; any process can log to it
killed_runs.py      mark runs as KILLED
process_tags.py     tags for the process, command and commit behind a run
metrics.py          the table of metric names
delivery.py         the thread that sends log entries, and the file that keeps a copy of waiting entries
entries.py          log entries, and the requests to MLflow that deliver them
server.py           the address of the server, and its experiment
logged_models.py    students as logged models, which can be loaded, served and registered
student_pyfunc.py   the code of a logged model
"""

from kac.util.errors import without_keys as without_password
from pipeline.tracking.metrics import DIAGNOSTIC_PREFIX, METRICS, PART_PREFIX, declare, declared
from pipeline.tracking.runs import FINGERPRINT_TAG, INPUT_TAG, STAGE_TAG, find_runs, run_of_output, start_run
from pipeline.tracking.server import RUN_FILE, connect, experiment_name, is_refusal, tracking_off, tracking_uri
from pipeline.tracking.tracked_run import LoggedDataset, TrackedRun

__all__ = [
    "DIAGNOSTIC_PREFIX",
    "FINGERPRINT_TAG",
    "INPUT_TAG",
    "METRICS",
    "PART_PREFIX",
    "RUN_FILE",
    "STAGE_TAG",
    "LoggedDataset",
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
