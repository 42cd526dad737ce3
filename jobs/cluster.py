"""`python -m jobs.cluster --help`"""

from jobs.command import Command, main_of
from pipeline.cluster import check as cluster_check

COMMANDS: dict[str, Command] = {
    "check": (cluster_check.CheckSpec, cluster_check.check),
}

if __name__ == "__main__":
    about = "Find out whether a cluster, its storage and the tracking server will take a job, before it is submitted."
    main_of(COMMANDS, "python -m jobs.cluster", about)
