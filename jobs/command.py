"""What every job shares: its spec from the command line, one line for every error, and an exit code."""

import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

from botocore.exceptions import BotoCoreError

from jobs.parsing import SpecType, parse
from kac.util.errors import DistillKacError, as_options, one_line
from kac.util.log import show
from kac.util.path_options import check_kinds
from pipeline.cluster import environment, storage
from pipeline.config.specs import Spec

SYNC = "--sync-tracking"
"""An option of every job: first deliver what earlier ones could not; with nothing else that is all."""

TERMINATED = 128 + signal.SIGTERM

Command = tuple[type[Spec], Callable[[Any], object]]
"""The options of a command, and what it runs."""


def main(
    spec_type: type[SpecType], stage: Callable[[SpecType], object], prog: str = "", arguments: list[str] | None = None
) -> None:
    """Parse the spec of a job, run its stage, and exit: 0, 1 for an error of the stage, 2 for one of the options."""
    show()
    prog = prog or f"python -m jobs.{spec_type.stage}"
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        environment.make_absolute()
    except DistillKacError as error:
        fail(prog, error, 2)
    if SYNC in arguments:
        arguments = [word for word in arguments if word != SYNC]
        _sync(prog, is_all=not arguments)
    try:
        spec = parse(spec_type, arguments, prog)
    except DistillKacError as error:
        fail(prog, error, 2)
    signal.signal(signal.SIGTERM, _end)
    try:
        if spec.is_probed:
            check_kinds(spec)
            storage.check_answers(spec)
        stage(spec)
    except (DistillKacError, OSError, BotoCoreError) as error:
        # What the disk or S3 refuses is for the user to mend as well; anything else is a bug and keeps its traceback.
        fail(prog, error, 1)
    except KeyboardInterrupt:
        fail(prog, "interrupted: run the same command again to go on", 130)
    except SystemExit as stop:
        # Where the job waits for Ray, Ray makes SystemExit(1) of ours; its own handler ends with the signal's number.
        was_told = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if not was_told and stop.code not in {signal.SIGTERM, TERMINATED}:
            raise
        fail(prog, "terminated: run the same command again to go on", TERMINATED)


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


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    """End as on Ctrl-C, so that runs are closed: ``ray job stop`` sends SIGTERM. A second one ends at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise SystemExit(TERMINATED)


def _sync(prog: str, is_all: bool) -> None:
    from pipeline.tracking.housekeeping import sync

    try:
        sync()
    except DistillKacError as error:
        if is_all:
            fail(prog, error, 1)
        print(f"{prog}: {as_options(one_line(error))}", file=sys.stderr, flush=True)
    if is_all:
        raise SystemExit(0)


def fail(prog: str, error: object, code: int) -> NoReturn:
    """Print what is wrong in one line and exit."""
    print(f"{prog}: error: {as_options(one_line(error, most=5000))}", file=sys.stderr, flush=True)
    raise SystemExit(code)
