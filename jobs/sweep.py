"""`python -m jobs.sweep --help`"""

import argparse
import sys

from jobs.command import fail, main
from pipeline.config import SWEEPS
from pipeline.sweep import sweep

PROG = "python -m jobs.sweep"


def run(arguments: list[str]) -> None:
    """Run a sweep of the stage that ``--stage`` names: distill (default) or teach."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--stage", choices=[*SWEEPS], default="distill")
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        fail(PROG, f"--stage: {error.message.partition(' (')[0]}. Choose {' or '.join(SWEEPS)}.", 2)
    main(SWEEPS[given.stage], sweep, PROG if given.stage == "distill" else f"{PROG} --stage {given.stage}", rest)


if __name__ == "__main__":
    run(sys.argv[1:])
