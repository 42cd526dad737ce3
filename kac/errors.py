"""Errors whose one-line message is meant for the person at the terminal."""


class DistillKacError(Exception):
    """Base of all refusals: says what was expected, what was found and what to do."""


class CheckpointError(DistillKacError):
    """A model folder is missing, damaged or does not match."""
