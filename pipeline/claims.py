"""Claims: one job at a time writes a folder.

OUT/claim.json names the process that works there, and is removed when the work ends. A second job on the same machine
is refused while that process is alive. A job on another machine cannot see the process: it takes the folder, and the
former job stops at its next checkpoint, or before it writes its result. So a job whose machine was lost can resume
anywhere at once.
"""

import atexit
import contextlib
import json
import time
import uuid

from kac.util import files
from kac.util.errors import DistillKacError
from pipeline.tracking import processes

CLAIM_FILE = "claim.json"

WAIT_SECONDS = 10.0
"""Ray ends the workers of a killed driver within this time; until then they look like another job."""

POLL_SECONDS = 0.5

_held: dict[str, str] = {}
"""The claims of this process: tokens by folder."""


def take(out: str) -> None:
    """Claim the folder for this process, until ``release``.

    Raises:
        DistillKacError: another process of this machine works there.
    """
    path, token, deadline = files.join(out, CLAIM_FILE), uuid.uuid4().hex, time.monotonic() + WAIT_SECONDS
    record = json.dumps({"token": token, **processes.tags()}, indent=2).encode()
    while True:
        found = _read(out)
        if found is None or found["token"] == _held.get(out) or not processes.is_alive(found):
            if files.write_bytes(path, record, if_absent=found is None):
                _held[out] = token
                return
        elif time.monotonic() >= deadline:
            raise DistillKacError(
                f"{out}: another job is writing this folder, {_describe(found)}. Wait until it ends, or choose "
                "another `out`."
            )
        else:
            time.sleep(POLL_SECONDS)


def token_of(out: str) -> str:
    """The token of this process's claim; empty if it has none."""
    return _held.get(out, "")


def check(out: str, token: str) -> None:
    """Stop a job that has lost the folder.

    Raises:
        DistillKacError: another job has taken the folder.
    """
    found = _read(out)
    if token and found and found["token"] != token:
        raise DistillKacError(
            f"{out}: another job has taken this folder, {_describe(found)}, so this job stops. Choose another `out` "
            "for one of them."
        )


def release(out: str) -> None:
    """End this process's claim, if it has one."""
    token = _held.pop(out, None)
    found = _read(out) if token else None
    if found and found["token"] == token:
        files.remove(files.join(out, CLAIM_FILE))


@atexit.register
def _release_all() -> None:
    for out in list(_held):
        with contextlib.suppress(Exception):  # the claim of an ended process holds up no other
            release(out)


def _read(out: str) -> dict[str, str] | None:
    """The claim on the folder; None without one. A damaged one is of no process."""
    names = ("token", *processes.tags())
    try:
        record = json.loads(files.read_bytes(files.join(out, CLAIM_FILE)))
        return {name: str(record[name]) for name in names}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        return dict.fromkeys(names, "")


def _describe(found: dict[str, str]) -> str:
    return f"process {found[processes.PID_TAG]} on {found[processes.HOST_TAG]}"
