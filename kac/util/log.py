"""The project's logger, ``distillkac``.

In your own code, ``logging.basicConfig(level="INFO")`` shows the messages. Jobs and their Ray workers call ``show``.
"""

import logging
import sys

from kac.util.errors import as_options

log = logging.getLogger("distillkac")
log.addHandler(logging.NullHandler())
progress_log = log.getChild("progress")
"""The logger for progress lines, which go to stderr."""


class _Printed(logging.Handler):
    """Prints plain messages: warnings and progress to stderr, everything else to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        is_result = record.levelno < logging.WARNING and record.name != progress_log.name
        stream = sys.stdout if is_result else sys.stderr  # looked up for each record, because tests replace both
        print(as_options(self.format(record)), file=stream, flush=True)


def show() -> None:
    """Print the project's log messages, with argument names shown as command-line options."""
    if not any(isinstance(handler, _Printed) for handler in log.handlers):
        log.addHandler(_Printed())
        log.setLevel(logging.INFO)
        log.propagate = False
