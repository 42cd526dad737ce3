"""`python -m jobs.store --help`: describe, verify and merge endpoint stores."""

import contextlib
import io
import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from jobs.command import fail, one_line, run
from kac.errors import DistillKacError
from kac.options import OptionError
from pipeline.config import Spec
from pipeline.store import describe, merge, verify

PROG = "python -m jobs.store"
DESCRIPTION = "Look after endpoint stores: say what one is, check every byte of it, join several."

Command = (
    Annotated[describe.DescribeSpec, tyro.conf.subcommand("describe")]
    | Annotated[verify.VerifySpec, tyro.conf.subcommand("verify")]
    | Annotated[merge.MergeSpec, tyro.conf.subcommand("merge")]
)

STAGES: dict[type[Spec], tuple[str, Callable[[Any], object]]] = {
    describe.DescribeSpec: ("describe", describe.run),
    verify.VerifySpec: ("verify", verify.run),
    merge.MergeSpec: ("merge", merge.merge),
}


def main() -> None:
    """Parse the command, run it, and exit: 0, 1 for an error or a store that is not whole, 2 for wrong options."""
    try:
        spec = parse(sys.argv[1:])
    except DistillKacError as error:
        fail(PROG, error, 2)
    name, stage = STAGES[type(spec)]
    run(f"{PROG} {name}", stage, spec)


def parse(arguments: list[str]) -> Spec:
    """The spec of the command that the arguments describe.

    Raises:
        OptionError: unknown, missing or invalid options.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            spec: Spec = tyro.cli(
                Command,
                prog=PROG,
                description=DESCRIPTION,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise OptionError(one_line(complaint.getvalue())) from None
    return spec


if __name__ == "__main__":
    main()
