"""Claims: only one job at a time writes a folder.

OUT/claim.json names the process that writes the folder, and is removed when the stage's run ends. A second job on the
same machine is refused while that process is alive. A job on another machine cannot see the process and takes over the
folder. The first job then stops at its next checkpoint, or before it writes its result. So a job whose machine was lost
can resume on any machine at once.
"""

import json
import time
import uuid

from kac.util import files
from kac.util.errors import DistillKacError
from pipeline.tracking import process_tags

CLAIM_FILE = "claim.json"

WAIT_SECONDS = 10.0
"""Ray ends the workers of a killed driver within this time. Until then they look like another job."""

POLL_SECONDS = 0.5

_held: dict[str, str] = {}
"""The tokens of this process's claims, by folder."""


def take(out: str) -> None:
    """Claim the folder for this process, until ``release``.

    Raises:
        DistillKacError: another process on this machine has claimed it.
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
                f"{out}: another job is writing this folder, {_describe(claim)}. Wait until it ends, or choose another "
                "`out`."
            )
        else:
            time.sleep(POLL_SECONDS)


def token_of(out: str) -> str:
    """The token of this process's claim on the folder; empty without one."""
    return _held.get(out, "")


def check(out: str, token: str) -> None:
    """Raise ``DistillKacError`` if another job has taken over the folder that the claim with this token was for."""
    claim = _read(out)
    if token and claim and claim["token"] != token:
        raise DistillKacError(
            f"{out}: another job has taken over this folder, {_describe(claim)}, so that this job stops. Choose "
            "another `out` for one of the jobs."
        )


def release(out: str) -> None:
    """Remove this process's claim on the folder, if it has one."""
    token = _held.pop(out, None)
    claim = _read(out) if token else None
    if claim and claim["token"] == token:
        files.remove(files.join(out, CLAIM_FILE))


def _read(out: str) -> dict[str, str] | None:
    """The claim on the folder, or None. A damaged claim is read as that of no process."""
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
