"""`python -m jobs.runs --help`"""

from jobs.command import Command, main_of
from pipeline.tracking.delivery import SyncSpec, sync
from pipeline.tracking.killed_runs import CloseDeadSpec, close_dead

COMMANDS: dict[str, Command] = {"close-dead": (CloseDeadSpec, close_dead), "sync": (SyncSpec, sync)}

if __name__ == "__main__":
    about = "Manage runs in MLflow: close the runs of dead processes, and deliver log entries after a server failure."
    main_of(COMMANDS, "python -m jobs.runs", about)
