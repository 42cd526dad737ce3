"""`python -m jobs.runs --help`"""

from jobs.command import Command, main_of
from pipeline.tracking import housekeeping

COMMANDS: dict[str, Command] = {
    "close-dead": (housekeeping.CloseDeadSpec, housekeeping.close_dead),
    "sync": (housekeeping.SyncSpec, housekeeping.sync),
}

if __name__ == "__main__":
    about = "Look after the runs in MLflow: end those whose process has died, deliver what an absent server missed."
    main_of(COMMANDS, "python -m jobs.runs", about)
