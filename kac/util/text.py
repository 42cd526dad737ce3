"""Format text for messages."""

from collections.abc import Sequence


def shorten(names: Sequence[str], most: int) -> str:
    """Join the first ``most`` names, and append the number of remaining names: "a, b and 3 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
