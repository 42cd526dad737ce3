"""Check that a path can be read or written, before a job starts hours of work.

This module's S3 client gives up early. The client in ``files``, which does the actual work, can retry for minutes.
"""

import os
from typing import Any

import fsspec
from botocore.exceptions import NoCredentialsError
from fsspec.exceptions import FSTimeoutError

from kac.util import files
from kac.util.errors import DistillKacError, one_line, without_secrets

PROBE_SECONDS = 20.0
"""Seconds without an answer after which S3 counts as unavailable."""

PROBE_OPTIONS: dict[str, Any] = {
    **files.S3_OPTIONS,
    "config_kwargs": {
        "retries": {"mode": "standard", "total_max_attempts": 4},
        "connect_timeout": 5,
        "read_timeout": 10,
    },
}

PROBE_BYTES = bytes(64 * 2**10)  # not empty, because an empty file fits on a full disk


def check_answers(path: str) -> None:
    """Raise ``DistillKacError`` if S3 does not list an s3:// path within ``PROBE_SECONDS``. Skip other paths."""
    if path.startswith("s3://"):
        bucket, _, prefix = files.locate(path).path.partition("/")
        _request(path, "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)


def check_writable(path: str) -> None:
    """Raise ``DistillKacError`` if files cannot be written below ``path``. An S3 request may take ``PROBE_SECONDS``."""
    files.locate(path)  # raises its own error for an unknown scheme
    probe = files.join(path, files.temporary_name("probe"))
    if path.startswith("s3://"):
        bucket, _, key = files.locate(probe).path.partition("/")
        _request(path, "put_object", Bucket=bucket, Key=key, Body=PROBE_BYTES)
        _request(path, "head_object", Bucket=bucket, Key=key)
        _request(path, "delete_object", Bucket=bucket, Key=key)
        return
    try:
        files.write_bytes(probe, PROBE_BYTES)
        files.remove(probe)
    except Exception as error:  # noqa: BLE001 - filesystems raise errors of many types
        reason = one_line(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}").rstrip(".")
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "a parent folder is a file"
        raise DistillKacError(f"{path}: the path is not writable ({reason}). Choose another path.") from None


def _request(path: str, call: str, **request: Any) -> None:
    """Send one request to S3 with a client that gives up early."""
    fs = fsspec.filesystem("s3", **PROBE_OPTIONS)
    fs.retries = 1  # otherwise s3fs retries after botocore has given up
    try:
        fs.call_s3(call, timeout=PROBE_SECONDS, **request)
    except Exception as error:  # noqa: BLE001 - s3fs, botocore, aiohttp and asyncio raise errors of their own types
        raise DistillKacError(f"{path}: S3 {_describe_s3_error(path, error)}.") from None


KEY_ERRORS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidClientTokenId"}


def _describe_s3_error(path: str, error: Exception) -> str:
    """Describe how S3 failed, why, and what the user can do."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    code, reason = str(response.get("Error", {}).get("Code", "")), one_line(error, 160).rstrip(".")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    keys = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
    if code == "NoSuchBucket":
        return f"does not have the bucket {path.split('/')[2]}. Create it, or correct the path"
    if code in KEY_ERRORS:
        return f"does not accept the keys ({reason}). Check {keys}"
    if isinstance(error, NoCredentialsError):
        return f"needs keys. Set {keys}, or give the node an IAM role"
    if code in {"AccessDenied", "403"}:
        permissions = "s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject"
        return f"denies access ({reason}). Grant the keys or the role the permissions {permissions}"
    if code:
        return f"refused a request ({reason}). Check the bucket, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL"
    if isinstance(error, TimeoutError | FSTimeoutError):
        reason = f"no answer in {PROBE_SECONDS:.0f} s"
    return f"does not answer at {without_secrets(endpoint)} ({reason}). Check the network and AWS_ENDPOINT_URL"
