"""`python -m jobs.store --help`"""

from jobs.command import Command, main_of
from pipeline.store import describe, merge, verify

COMMANDS: dict[str, Command] = {
    "describe": (describe.DescribeSpec, describe.run),
    "verify": (verify.VerifySpec, verify.run),
    "merge": (merge.MergeSpec, merge.merge),
}

if __name__ == "__main__":
    about = "Describe, verify and merge endpoint stores."
    main_of(COMMANDS, "python -m jobs.store", about)
