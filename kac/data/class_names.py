"""Class names: sort the names, find a name's label, and list the names on one line."""

import re
from collections.abc import Iterable, Sequence

from kac.util.errors import ArgumentError

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")

LISTED, FIRST, LENGTH = 20, 3, 400
"""Lists of up to 20 classes and 400 characters are complete. Longer lists show the first three and the last class."""


def in_order(names: Iterable[str]) -> list[str]:
    """Sort class names as people do: numbers by value, and text that contains numbers by the values of these numbers.

    ``["10", "9"]`` becomes 9, 10, and ``["a10", "a9"]`` becomes a9, a10.
    """

    def natural_key(name: str) -> list[tuple[int, int]]:
        """Return a sort key that compares runs of digits by value, and other characters one by one."""
        parts = re.findall(r"[0-9]+|[^0-9]", name)
        return [(ord("0"), int(part)) if part[0] in "0123456789" else (ord(part), 0) for part in parts]

    names = sorted(names)
    return sorted(names, key=float if all(NUMBER.fullmatch(name) for name in names) else natural_key)


def label_of(word: str, names: Sequence[str], num_classes: int) -> int:
    """Find a class by its name or label, and return its label.

    If the names are integers, an integer is read as a name: ``1`` means the class named 1, not the class with label 1.

    Raises:
        ArgumentError: ``word`` is neither the name nor the label of a class.
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
    """List the classes on one line, such as "0=cat, 1=dog". Long lists omit the classes in the middle."""
    entries = [f"{label}={' '.join(name.split())}" for label, name in enumerate(names)]
    text = ", ".join(entries)
    if len(entries) <= LISTED and len(text) <= LENGTH:
        return text
    return ", ".join([*(entry[: LENGTH // 4] for entry in entries[:FIRST]), "...", entries[-1][: LENGTH // 4]])
