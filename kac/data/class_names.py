"""Names of classes: the order of their numbers, what ``--labels`` takes, and one line that lists them."""

import re
from collections.abc import Iterable, Sequence

from kac.errors import DistillKacError

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")

LISTED, FIRST, LENGTH = 20, 3, 400
"""Up to 20 classes are listed in full, otherwise the first three and the last, in about 400 letters."""


def in_order(names: Iterable[str]) -> list[str]:
    """The names in the order of their class numbers: numbers by value, other names as people sort them.

    ``["10", "9"]`` is 9, 10 and ``["a10", "a9"]`` is a9, a10. Names without numbers are in the order of their letters.
    """
    names = sorted(names)
    if all(NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=float)
    return sorted(names, key=_natural)


def _natural(name: str) -> list[tuple[int, int]]:
    """A key that compares runs of digits by value and everything else letter by letter."""
    parts = re.findall(r"[0-9]+|[^0-9]", name)
    return [(ord("0"), int(part)) if part[0] in "0123456789" else (ord(part), 0) for part in parts]


def label_of(word: str, names: Sequence[str], num_classes: int) -> int:
    """The number of the class that a word of ``--labels`` names or numbers.

    Where classes are named by numbers, a number is a name: of the classes 1 .. 12, ``1`` is the class named 1.

    Raises:
        DistillKacError: there is no such class.
    """
    if word in names:
        return names.index(word)
    values = {int(name): number for number, name in enumerate(names) if INTEGER.fullmatch(name)}
    if INTEGER.fullmatch(word):
        if int(word) in values:
            return values[int(word)]
        if not values and 0 <= int(word) < num_classes:
            return int(word)
    how = "by name, since numbers are names here" if values else "by name or number"
    known = f" {how} (label=name: {list_classes(names)})" if names else f" 0 .. {num_classes - 1}"
    raise DistillKacError(f"--labels: expected classes{known}, found {word!r}")


def list_classes(names: Sequence[str]) -> str:
    """The classes by number, on one line: ``0=cat, 1=dog``; the middle of many is left out."""
    classes = [f"{number}={' '.join(name.split())}" for number, name in enumerate(names)]
    text = ", ".join(classes)
    if len(classes) <= LISTED and len(text) <= LENGTH:
        return text
    return ", ".join([*(name[: LENGTH // 4] for name in classes[:FIRST]), "...", classes[-1][: LENGTH // 4]])
