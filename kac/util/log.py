"""The logger of this project, ``distillkac``.

Python code that uses the project sees its lines where it asks for them: ``logging.basicConfig(level="INFO")``. The
jobs and their Ray workers call ``show``.
"""

import logging
import sys

from kac.util.errors import as_options

log = logging.getLogger("distillkac")
log.addHandler(logging.NullHandler())
progress_log = log.getChild("progress")
"""For lines that say how far the work is, which are no results."""


class _Printed(logging.Handler):
    """Prints records without decoration: warnings and progress to stderr, all others to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        is_result = record.levelno < logging.WARNING and record.name != progress_log.name
        stream = sys.stdout if is_result else sys.stderr  # looked up here, because tests replace both
        print(as_options(self.format(record)), file=stream, flush=True)


def show() -> None:
    """Print the lines of this project for people, with arguments as options of a command line."""
    if not any(isinstance(handler, _Printed) for handler in log.handlers):
        log.addHandler(_Printed())
        log.setLevel(logging.INFO)
        log.propagate = False
