"""Errors whose one-line message is meant for the person at the terminal."""

from collections.abc import Collection


class DistillKacError(Exception):
    """Base of all refusals: says what was expected, what was found and what to do."""


class CheckpointError(DistillKacError):
    """A model folder is missing, damaged or does not match."""


def one_line(error: object, most: int = 300) -> str:
    """The text of an error on one line of at most ``most`` characters; the name of its type if it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def check_known(what: str, name: str, known: Collection[str]) -> None:
    """Raise ``ValueError`` unless ``name`` is a known one."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: expected one of {sorted(known)}")
