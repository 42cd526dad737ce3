"""`python -m jobs.sweep --help`"""

import argparse
import sys

from jobs.command import fail, main
from pipeline.config import SWEEPS
from pipeline.sweep import sweep


def run(arguments: list[str]) -> None:
    """Run a sweep of the stage that ``--stage`` names: distill (default) or teach."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--stage", choices=[*SWEEPS], default="distill")
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        fail("python -m jobs.sweep", f"--stage: {error.message}. Give --stage {' or '.join(SWEEPS)}.", 2)
    main(SWEEPS[given.stage], sweep, arguments=rest)


if __name__ == "__main__":
    run(sys.argv[1:])
