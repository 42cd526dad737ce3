"""MLflow tracking: one experiment, one run per output; fingerprint tags link teacher, store, student and evaluation.

runs.py             starts or resumes a stage's run, measures the machine, ends the run, and finds runs
tracked_run.py      defines the handle of a run, through which any process can log to the run
killed_runs.py      marks runs as KILLED
process_tags.py     creates the tags for a run's process, command and commit
metrics.py          defines the table of metrics
delivery.py         sends log entries in a thread, and keeps a copy of waiting entries in a file
entries.py          defines log entries, and the MLflow requests that deliver them
server.py           finds the server's address, and connects to the experiment
logged_models.py    logs students and teachers as models, which can be loaded, served and registered
student_pyfunc.py   loads a logged model and draws its samples; MLflow runs this code
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
