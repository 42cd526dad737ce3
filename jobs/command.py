"""What every job shares: a spec from the command line and a YAML file, and one line for every error."""

import contextlib
import io
import itertools
import sys
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import tyro
import yaml
from botocore.exceptions import BotoCoreError
from pydantic import BaseModel

from kac.errors import DistillKacError
from kac.options import OptionError
from pipeline.config import Spec

SpecType = TypeVar("SpecType", bound=Spec)


def main(spec_type: type[SpecType], stage: Callable[[SpecType], object]) -> None:
    """Parse the spec of a job, run its stage, and exit: 0, 1 for an error of the stage, 2 for one of the options."""
    prog = f"python -m jobs.{stage.__module__.rsplit('.', 1)[-1]}"
    try:
        spec = parse(spec_type, sys.argv[1:], prog)
    except DistillKacError as error:
        fail(prog, error, 2)
    run(prog, stage, spec)


def run(prog: str, stage: Callable[[SpecType], object], spec: SpecType) -> None:
    """Run a stage; its error is one line and exit code 1."""
    try:
        stage(spec)
    except (DistillKacError, OSError, BotoCoreError) as error:
        # What the disk or S3 refuses is the person's to mend as well; anything else is a bug and keeps its traceback.
        fail(prog, " ".join(str(error).split()) or type(error).__name__, 1)
    except KeyboardInterrupt:
        fail(prog, "interrupted: run the same command again to go on", 130)


def parse(spec_type: type[SpecType], arguments: list[str], prog: str) -> SpecType:
    """The spec that the arguments describe; ``--config FILE.yaml`` gives defaults that options override.

    Raises:
        OptionError: unknown, missing or invalid options, on the command line or in the file.
    """
    arguments, config = _split_config(arguments)
    defaults = _defaults(spec_type, config)
    description = (
        f"{(spec_type.__doc__ or '').strip()}\n\n--config FILE.yaml reads options from a file; others override it."
    )
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            spec: SpecType = tyro.cli(
                spec_type,
                prog=prog,
                description=description,
                args=arguments,
                default=defaults,
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
            return spec
    except SystemExit as stop:
        if not stop.code:
            raise
        raise OptionError(one_line(complaint.getvalue())) from None


def _split_config(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    rest, config, pending = [], {}, iter(arguments)
    for argument in pending:
        option, equals, path = argument.partition("=")
        if option != "--config":
            rest.append(argument)
            continue
        path = path if equals else next(pending, "")
        if not path:
            raise OptionError("--config: expected a YAML file, found nothing")
        config = _read_yaml(path)
    return rest, config


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"--config {path}: expected a YAML file, found: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise OptionError(f"--config {path}: expected a mapping of options, found {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _defaults(model: type[BaseModel], values: dict[str, Any], base: BaseModel | None = None) -> Any:
    """An instance of ``model`` for tyro: values of the file, else of ``base``, else defaults, else MISSING."""
    unknown = sorted(set(values) - set(model.model_fields))
    if unknown:
        raise OptionError(f"--config: unknown option {unknown[0]!r}: expected some of {sorted(model.model_fields)}")
    filled: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            nested = values.get(name, {})
            if not isinstance(nested, dict):
                raise OptionError(f"--config: {name}: expected a mapping, found {nested!r}")
            nested = {str(key).replace("-", "_"): value for key, value in nested.items()}
            own = None if field.is_required() else field.get_default(call_default_factory=True)
            filled[name] = _defaults(kind, nested, own)
        elif name in values:
            is_tuple = any(typing.get_origin(part) is tuple for part in (kind, *typing.get_args(kind)))
            value = values[name]
            filled[name] = tuple(value) if is_tuple and isinstance(value, list) else value
        elif base is not None:
            filled[name] = getattr(base, name)
        else:
            filled[name] = tyro.MISSING if field.is_required() else field.get_default(call_default_factory=True)
    return model.model_construct(**filled)


def one_line(box: str) -> str:
    """The sentence inside the box that tyro draws on the terminal."""
    lines = [line.strip(" │╭╮╰╯─") for line in box.splitlines()]
    lines = list(itertools.takewhile(lambda line: line != "Argument helptext:", lines))
    words = " ".join(line for line in lines[1:] if line and not line.startswith(("For full helptext", "python -m")))
    return f"{words}: see --help"


def fail(prog: str, error: object, code: int) -> typing.NoReturn:
    """Say what is wrong in one line and exit."""
    print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(code)
