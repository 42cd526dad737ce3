"""Errors with a one-line message for the user."""

import os
import re
from collections.abc import Collection

SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
    "HF_TOKEN",
)
"""Environment variables whose values must never be printed or stored."""

USER = re.compile(r"(?<=//)[^/\s'\"]*@")  # http://user:password@host
KEY = re.compile(
    r"([?&](?:x-amz-[\w-]+|x-goog-[\w-]+|awsaccesskeyid|signature|sig|(?:\w*_)?(?:token|password|secret|key))=)[^&\s'\"]+",
    re.I,
)  # keys in a URI's query string, as in a presigned URL
ARGUMENT = re.compile(r"`([a-z_][a-z0-9_.]*)`")


class DistillKacError(Exception):
    """Base class of this project's errors. The message says what is wrong and what to do."""


class ArgumentError(DistillKacError, ValueError):
    """An argument is missing, unknown or out of range.

    Messages put argument names in backquotes, as in "`batch_size` is 0, but should be greater than 0." The jobs show
    these names as command-line options (``as_options``).
    """

    @property
    def name(self) -> str:
        """The first argument name in the message. Nested names have dots: "optimizer.learning_rate"."""
        match = ARGUMENT.search(str(self))
        return match[1] if match else ""


class UnknownArgument(ArgumentError):
    """An argument that does not exist in this version. A newer version may accept it."""


class CheckpointError(DistillKacError):
    """A model folder is missing, damaged or unsuitable for the task."""


class StorageError(DistillKacError):
    """A request to S3 failed. Another try may succeed."""


class DivergedError(DistillKacError):
    """A network returned NaN or infinity. A run with the same options would fail again."""


def as_options(text: str) -> str:
    """Return the text with argument names written as command-line options: `batch_size` becomes --batch-size."""
    return ARGUMENT.sub(lambda match: f"--{match[1].replace('_', '-')}", text)


def one_line(error: object, most: int = 300) -> str:
    """Return an error's text on one line of at most ``most`` characters, or the error's type if the text is empty."""
    return without_secrets(" ".join(str(error).split()))[:most] or type(error).__name__


def without_secrets(text: str) -> str:
    """Remove from ``text`` the values of ``SECRET_VARIABLES`` and any passwords and keys in URIs."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:  # a shorter value could be part of an ordinary word
            text = text.replace(value, f"${name}")
    return without_keys(text)


def without_keys(uri: str) -> str:
    """Remove passwords and keys from a URI, or from a text that contains URIs."""
    return KEY.sub(r"\1...", USER.sub("", uri))


def has_secret(path: str) -> bool:
    """Return whether a path or URI contains a password or a key."""
    return without_secrets(path) != path if "://" in path else False


def check_known(argument: str, value: str, known: Collection[str]) -> None:
    """Raise ``ValueError`` if ``value`` is not one of the known values."""
    if value not in known:
        raise ValueError(f"`{argument}` is {value!r}. Choose one of {', '.join(sorted(known))}.")
