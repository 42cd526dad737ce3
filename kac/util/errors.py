"""Errors whose one-line message is meant for the person at the terminal."""

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
)
"""Variables of the environment whose values no text may show."""

USER = re.compile(r"(?<=//)[^/\s'\"]*@")
"""Who asks, and by which password, in a URI: ``http://user:password@host``."""

KEY = re.compile(
    r"([?&](?:x-amz-[\w-]+|x-goog-[\w-]+|awsaccesskeyid|signature|sig|(?:\w*_)?(?:token|password|secret|key))=)[^&\s'\"]+",
    re.I,
)
"""A key in the query of a URI, as a presigned one has them."""


ARGUMENT = re.compile(r"`([a-z_][a-z0-9_.]*)`")
"""The name of an argument in a message."""


class DistillKacError(Exception):
    """Base of all refusals: says what was expected, what was found and what to do."""


class ArgumentError(DistillKacError, ValueError):
    """An argument is missing, unknown or out of range.

    Messages write the names of arguments in backquotes: "`steps` is 3, but should be a divisor of 20". The jobs show
    them as options, see ``as_options``.
    """

    @property
    def name(self) -> str:
        """The first argument that the message names, dotted if it is nested: "optimizer.learning_rate"."""
        found = ARGUMENT.search(str(self))
        return found[1] if found else ""


class UnknownArgument(ArgumentError):
    """An argument that does not exist here. A newer version may have it."""


class CheckpointError(DistillKacError):
    """A model folder is missing, damaged or does not match."""


class DivergedError(DistillKacError):
    """A network gives NaN or infinity. The same options lead there again."""


def as_options(text: str) -> str:
    """The text with the names of arguments as options of a command line: `batch_size` becomes --batch-size."""
    return ARGUMENT.sub(lambda found: f"--{found[1].replace('_', '-')}", text)


def one_line(error: object, most: int = 300) -> str:
    """The text of an error on one line of at most ``most`` characters; the name of its type if it has no text."""
    return without_secrets(" ".join(str(error).split()))[:most] or type(error).__name__


def without_secrets(text: str) -> str:
    """The text without passwords and keys: those in URIs, and the values of ``SECRET_VARIABLES``."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:  # a shorter one is no secret, and may be part of any word
            text = text.replace(value, f"${name}")
    return without_keys(text)


def without_keys(uri: str) -> str:
    """The URI, or a text with URIs, without their passwords and keys."""
    return KEY.sub(r"\1...", USER.sub("", uri))


def has_secret(path: str) -> bool:
    """Whether a path or URI has a password or a key in it."""
    return without_secrets(path) != path if "://" in path else False


def check_known(what: str, name: str, known: Collection[str]) -> None:
    """Raise ``ValueError`` unless ``name`` is a known one."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: expected one of {sorted(known)}")
