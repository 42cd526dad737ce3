"""Names of classes: their order, their labels, and a line that lists them."""

import re
from collections.abc import Iterable, Sequence

from kac.util.errors import ArgumentError

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")

LISTED, FIRST, LENGTH = 20, 3, 400
"""Up to 20 classes are listed in full; of more, the first three and the last. A line has about 400 characters."""


def in_order(names: Iterable[str]) -> list[str]:
    """Sort class names as people do: numbers by value, and text with numbers in it by the value of these numbers.

    ``["10", "9"]`` becomes 9, 10, and ``["a10", "a9"]`` becomes a9, a10.
    """

    def natural_key(name: str) -> list[tuple[int, int]]:
        """A sort key that compares runs of digits by value, and other characters one by one."""
        parts = re.findall(r"[0-9]+|[^0-9]", name)
        return [(ord("0"), int(part)) if part[0] in "0123456789" else (ord(part), 0) for part in parts]

    names = sorted(names)
    return sorted(names, key=float if all(NUMBER.fullmatch(name) for name in names) else natural_key)


def label_of(word: str, names: Sequence[str], num_classes: int) -> int:
    """Return the label of a class that is given by name or by label.

    If classes are named by integers, an integer is a name: of the classes 1 .. 12, ``1`` is the class named 1.

    Raises:
        ArgumentError: there is no such class.
    """
    if word in names:
        return names.index(word)
    values = {int(name): number for number, name in enumerate(names) if INTEGER.fullmatch(name)}
    if INTEGER.fullmatch(word):
        if int(word) in values:
            return values[int(word)]
        if not values and 0 <= int(word) < num_classes:
            return int(word)
    choices = f"0 .. {num_classes - 1}"
    if names:
        how = "by name, because the names are numbers" if values else "by name or label"
        choices = f"these, {how} (label=name): {list_classes(names)}"
    raise ArgumentError(f"`labels` {word!r} is not a class. Choose from {choices}.")


def list_classes(names: Sequence[str]) -> str:
    """List the classes on one line, "0=cat, 1=dog". Of many classes, those in the middle are left out."""
    entries = [f"{label}={' '.join(name.split())}" for label, name in enumerate(names)]
    text = ", ".join(entries)
    if len(entries) <= LISTED and len(text) <= LENGTH:
        return text
    return ", ".join([*(entry[: LENGTH // 4] for entry in entries[:FIRST]), "...", entries[-1][: LENGTH // 4]])
