"""Whether a place can be read and written to, asked before work begins that would find out hours later.

S3 is asked by a client that gives up early: the one of ``files``, which work is done with, tries for minutes.
"""

import os
from typing import Any

import fsspec
from botocore.exceptions import NoCredentialsError
from fsspec.exceptions import FSTimeoutError

from kac.util import files
from kac.util.errors import DistillKacError, one_line, without_secrets

PROBE_SECONDS = 20.0
"""An S3 that has not answered by then is away: what follows would try for minutes."""

IMPATIENT: dict[str, Any] = {
    **files.S3_OPTIONS,
    "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 3}, "connect_timeout": 5, "read_timeout": 10},
}

PROBE_BYTES = bytes(64 * 2**10)
"""An empty file fits on a full disk."""


def check_answers(path: str) -> None:
    """Raise within ``PROBE_SECONDS`` if S3 does not let us look at an s3:// path; other paths are not looked at.

    Raises:
        DistillKacError: no such bucket, no permission, wrong keys, or nobody answers.
    """
    if path.startswith("s3://"):
        bucket, _, prefix = files.locate(path).path.partition("/")
        _ask(path, "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)


def check_writable(path: str) -> None:
    """Raise now what the first write below ``path`` would raise hours later; on S3 within ``PROBE_SECONDS``.

    Raises:
        DistillKacError: nothing can be written there.
    """
    files.locate(path)  # an unknown scheme is another error
    probe = files.join(path, files.temporary_name("probe"))
    if path.startswith("s3://"):
        bucket, _, key = files.locate(probe).path.partition("/")
        _ask(path, "put_object", Bucket=bucket, Key=key, Body=PROBE_BYTES)
        _ask(path, "head_object", Bucket=bucket, Key=key)
        _ask(path, "delete_object", Bucket=bucket, Key=key)
        return
    try:
        files.write_bytes(probe, PROBE_BYTES)
        files.remove(probe)
    except Exception as error:  # noqa: BLE001 - whatever a filesystem raises, this is what it means
        is_blocked = isinstance(error, FileExistsError | NotADirectoryError)
        reason = (
            "a file where a folder must be"
            if is_blocked
            else getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        )
        raise DistillKacError(f"{path}: expected a place that can be written to, found: {one_line(reason)}") from None


def _ask(path: str, call: str, **request: Any) -> None:
    """One request to S3, by a client that gives up early."""
    fs = fsspec.filesystem("s3", **IMPATIENT)
    fs.retries = 1  # s3fs repeats what botocore has given up on
    try:
        fs.call_s3(call, timeout=PROBE_SECONDS, **request)
    except Exception as error:  # noqa: BLE001 - of s3fs, botocore, aiohttp and asyncio
        raise DistillKacError(f"{path}: {_s3_trouble(path, error)}") from None


KEY_ERRORS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidClientTokenId"}


def _s3_trouble(path: str, error: Exception) -> str:
    """What S3 has against a request, and what to do."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    said = one_line(error, 160)
    if code == "NoSuchBucket":
        return f"expected a bucket, found none called {path.split('/')[2]}: create it, or mend the path"
    if code in KEY_ERRORS:
        names = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        return f"expected keys that S3 knows, found: {said}: check {names}"
    if isinstance(error, NoCredentialsError):
        return (
            "expected keys for S3, found none: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the node a role"
        )
    if code in {"AccessDenied", "403"}:
        return (
            f"expected permission, found: {said}: give these keys or this role s3:ListBucket, s3:GetObject, "
            "s3:PutObject and s3:DeleteObject there"
        )
    if code:
        return f"expected S3 to answer, found: {said}: check the bucket, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL"
    where = without_secrets(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS")
    found = f"no answer in {PROBE_SECONDS:.0f} s" if isinstance(error, TimeoutError | FSTimeoutError) else said
    return f"expected S3 to answer at {where}, found: {found}: check the network and AWS_ENDPOINT_URL"
