"""Claims make sure that only one job at a time writes to a folder.

OUT/claim.json names the process that is writing to the folder. The stage removes the file when its run ends. While the
process is alive, a second job on the same machine is refused. A job on a different machine cannot see the process, so
it takes over the folder, and the first job stops at its next checkpoint or before it writes its result. A job whose
machine was lost can therefore resume on any machine at once.
"""

import json
import time
import uuid

from kac.util import files
from kac.util.errors import DistillKacError
from pipeline.tracking import process_tags

CLAIM_FILE = "claim.json"

WAIT_SECONDS = 10.0
"""Ray ends a killed driver's workers within this time. Until then, they look like another job."""

POLL_SECONDS = 0.5

_held: dict[str, str] = {}
"""The tokens of this process's claims, by folder."""


def take(out: str) -> None:
    """Claim the folder for this process until ``release`` is called.

    Raises:
        DistillKacError: another process on this machine has claimed the folder.
    """
    token, deadline = uuid.uuid4().hex, time.monotonic() + WAIT_SECONDS
    record = json.dumps({"token": token, **process_tags.tags()}, indent=2).encode()
    while True:
        claim = _read(out)
        if claim is None or claim["token"] == _held.get(out) or not process_tags.is_alive(claim):
            if files.write_bytes(files.join(out, CLAIM_FILE), record, if_absent=claim is None):
                _held[out] = token
                return
        elif time.monotonic() >= deadline:
            raise DistillKacError(
                f"{out}: another job ({_describe(claim)}) is writing to this folder. Wait until it ends, or choose "
                "another `out`."
            )
        else:
            time.sleep(POLL_SECONDS)


def token_of(out: str) -> str:
    """The token of this process's claim on the folder, or an empty string if there is no claim."""
    return _held.get(out, "")


def check(out: str, token: str) -> None:
    """Raise ``DistillKacError`` if another job has taken over the folder since it was claimed with this token."""
    claim = _read(out)
    if token and (claim is None or claim["token"] != token):
        other = f" ({_describe(claim)})" if claim else ""  # the other job removes its claim when it ends
        raise DistillKacError(
            f"{out}: another job{other} has taken over this folder, so this job stops. Choose another `out` for one of "
            "the jobs."
        )


def release(out: str) -> None:
    """Remove this process's claim on the folder, if it has one."""
    token = _held.pop(out, None)
    claim = _read(out) if token else None
    if claim and claim["token"] == token:
        files.remove(files.join(out, CLAIM_FILE))


def _read(out: str) -> dict[str, str] | None:
    """The claim on the folder, or None if there is no claim. The fields of a damaged claim are empty."""
    names = ("token", *process_tags.tags())
    try:
        record = json.loads(files.read_bytes(files.join(out, CLAIM_FILE)))
        return {name: str(record[name]) for name in names}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        return dict.fromkeys(names, "")


def _describe(claim: dict[str, str]) -> str:
    return f"process {claim[process_tags.PID_TAG]} on {claim[process_tags.HOST_TAG]}"
