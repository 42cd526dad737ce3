"""Run a job: parse its spec, run its stage, show errors in one line, and exit with a code."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

from botocore.exceptions import BotoCoreError

from jobs.parsing import SpecType, parse
from kac.util.errors import DistillKacError, as_options, one_line
from kac.util.log import show
from kac.util.path_options import check_kinds
from pipeline.cluster import environment, storage
from pipeline.config import Spec

SYNC = "--sync-tracking"
"""An option of every job: first deliver the log entries that earlier jobs could not deliver."""

TERMINATED = 128 + signal.SIGTERM
Command = tuple[type[Spec], Callable[[Any], object]]  # the command's spec type, and the function that runs the command


def main(
    spec_type: type[SpecType], stage: Callable[[SpecType], object], prog: str = "", arguments: list[str] | None = None
) -> None:
    """Parse the spec of a job and run its stage. Exit with 1 if the stage fails, or with 2 if an option is invalid."""
    show()
    prog = prog or f"python -m jobs.{spec_type.stage}"
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        environment.make_absolute()
        if SYNC in arguments:
            arguments = [word for word in arguments if word != SYNC]
            _sync(prog, exit_after=not arguments)
        with _quiet_if_stdout_closes():
            spec = parse(spec_type, arguments, prog)
    except DistillKacError as error:
        fail(prog, error, 2)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        if spec.is_probed:
            check_kinds(spec)
            storage.check_answers(spec)
        stage(spec)
    except (DistillKacError, OSError, BotoCoreError) as error:
        # Users can fix disk and S3 errors. Any other exception is a bug and keeps its traceback.
        fail(prog, error, 1)
    except KeyboardInterrupt:
        fail(prog, "interrupted. Run the same command again to resume.", 130)
    except SystemExit as stop:
        # While the job waits for Ray, Ray turns our SystemExit into SystemExit(1). Ray's own handler exits with the
        # signal's number.
        was_terminated = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if not was_terminated and stop.code not in {signal.SIGTERM, TERMINATED}:
            raise
        fail(prog, "terminated. Run the same command again to resume.", TERMINATED)


def main_of(commands: Mapping[str, Command], prog: str, description: str) -> None:
    """Run one of a job's several commands, as ``main`` does."""
    name, *arguments = sys.argv[1:] or [""]
    if name in {"-h", "--help"}:
        with _quiet_if_stdout_closes():
            print(f"usage: {prog} COMMAND [-h] [OPTIONS]\n\n{description}\n")
            width = max(map(len, commands))
            for command, (spec_type, _) in commands.items():
                print(f"  {command:{width}}  {spec_type.__doc__}")
            print(f"\nHelp on a command: {prog} COMMAND --help")
    elif name in commands:
        main(*commands[name], f"{prog} {name}", arguments)
    else:
        problem = f"{name!r} is not a command" if name else "a command is required"
        fail(prog, f"{problem}. Choose {' or '.join(commands)}, or see --help.", 2)


def fail(prog: str, error: object, code: int) -> NoReturn:
    """Print an error in one line and exit."""
    print(f"{prog}: error: {as_options(one_line(error, most=5000))}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """Exit as after Ctrl-C, so that runs are closed. ``ray job stop`` sends SIGTERM; a second SIGTERM exits at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise SystemExit(TERMINATED)


def _sync(prog: str, exit_after: bool) -> None:
    from pipeline.tracking.delivery import sync

    try:
        sync()
    except DistillKacError as error:
        if exit_after:
            fail(prog, error, 1)
        print(f"{prog}: {as_options(one_line(error))}", file=sys.stderr, flush=True)
    if exit_after:
        raise SystemExit(0)


@contextlib.contextmanager
def _quiet_if_stdout_closes() -> Iterator[None]:
    """Exit without a traceback if the reader of stdout has exited, as in ``--help | head``."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Redirect stdout, because Python flushes it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
