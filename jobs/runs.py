"""`python -m jobs.runs --help`"""

from jobs.command import Command, main_of
from pipeline.tracking import housekeeping

COMMANDS: dict[str, Command] = {
    "close-dead": (housekeeping.CloseDeadSpec, housekeeping.close_dead),
    "sync": (housekeeping.SyncSpec, housekeeping.sync),
}

if __name__ == "__main__":
    about = "Manage runs in MLflow: close runs of dead processes, and deliver log entries after a server failure."
    main_of(COMMANDS, "python -m jobs.runs", about)
