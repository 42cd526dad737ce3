"""What every job shares: its spec from the command line, one line for every error, and an exit code."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from botocore.exceptions import BotoCoreError

from jobs.parsing import SpecType, parse
from kac.errors import DistillKacError, one_line
from pipeline.config import Spec

Command = tuple[type[Spec], Callable[[Any], object]]
"""The options of a command, and what it runs."""


def main(
    spec_type: type[SpecType], stage: Callable[[SpecType], object], prog: str = "", arguments: list[str] | None = None
) -> None:
    """Parse the spec of a job, run its stage, and exit: 0, 1 for an error of the stage, 2 for one of the options."""
    prog = prog or f"python -m jobs.{spec_type.stage}"
    try:
        spec = parse(spec_type, sys.argv[1:] if arguments is None else arguments, prog)
    except DistillKacError as error:
        fail(prog, error, 2)
    try:
        stage(spec)
    except (DistillKacError, OSError, BotoCoreError) as error:
        # What the disk or S3 refuses is for the user to mend as well; anything else is a bug and keeps its traceback.
        fail(prog, error, 1)
    except KeyboardInterrupt:
        fail(prog, "interrupted: run the same command again to go on", 130)


def main_of(commands: Mapping[str, Command], prog: str, description: str) -> None:
    """The same for a job with several commands."""
    name, *arguments = sys.argv[1:] or ["nothing"]
    if name in {"-h", "--help"}:
        print(f"usage: {prog} COMMAND [-h] [OPTIONS]\n\n{description}\n")
        for command, (spec_type, _) in commands.items():
            print(f"  {command:10}{spec_type.__doc__}")
    elif name in commands:
        main(*commands[name], f"{prog} {name}", arguments)
    else:
        fail(prog, f"expected one of {', '.join(commands)}, found {name}: see --help", 2)


def fail(prog: str, error: object, code: int) -> NoReturn:
    """Say what is wrong in one line and exit."""
    print(f"{prog}: error: {one_line(error, most=5000)}", file=sys.stderr, flush=True)
    raise SystemExit(code)
