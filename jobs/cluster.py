"""`python -m jobs.cluster --help`"""

from jobs.command import Command, main_of
from pipeline.cluster.check import CheckSpec, check

COMMANDS: dict[str, Command] = {"check": (CheckSpec, check)}

if __name__ == "__main__":
    about = "Check a cluster, its storage and the tracking server before you submit a job."
    main_of(COMMANDS, "python -m jobs.cluster", about)
