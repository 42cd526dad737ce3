"""Weights in files that others wrote. Nothing in them is run: only tensors and plain values are read."""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from kac.util import files
from kac.util.errors import CheckpointError, one_line
from kac.util.integrity import check_zip

WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that torch.compile, FSDP and activation checkpointing add, at any depth."""

AVERAGED = re.compile(r"(^|_)(ema|shadow|average|averaged|swa)(_|$)", re.IGNORECASE)
"""An entry with such a name has averaged weights, which are what is evaluated."""

MOST_SHOWN = 6


class WeightsFile(NamedTuple):
    """All tensors of a file by name; those of a nested entry follow its name and a dot."""

    named: dict[str, Tensor]
    unnamed: dict[str, list[Tensor]]  # lists of tensors, by the name of the entry
    entries: tuple[str, ...]  # the top level of the file
    sha256: str

    def describe(self) -> str:
        """What the file holds, in words."""
        if not self.named and not self.unnamed:
            shown = ", ".join(self.entries[:MOST_SHOWN])
            return f"no tensors in {shown}" if shown else "no named entries"
        example = "".join(f", such as {name} {list(value.shape)}" for name, value in list(self.named.items())[:1])
        total = len(self.named) + sum(map(len, self.unnamed.values()))
        return f"{total} tensors: {self.describe_entries(self.named)}{example}"

    def describe_entries(self, names: Collection[str], without: str | None = None) -> str:
        """The entries of some names, and the lists but ``without``, with the number of tensors in each."""
        parts = [f"{name} ({count})" for name, count in groups(names, self.named)]
        lists = [(name, tensors) for name, tensors in self.unnamed.items() if name != without]
        return listed([*parts, *(f"{name or 'a list'} ({len(tensors)} without names)" for name, tensors in lists)])


def read_weights(path: str) -> WeightsFile:
    """The tensors in a file of ``torch.save`` or of safetensors (local or s3://), on the CPU.

    Raises:
        CheckpointError: no such file, or something else than tensors and plain values in it.
    """
    try:
        data = files.read_bytes(path)
    except IsADirectoryError:
        inside = [
            name for name in files.list_sizes(path) if name.endswith((".safetensors", ".pt", ".pth", ".ckpt", ".bin"))
        ]
        found = f"a folder with {listed(sorted(inside))}" if inside else "a folder without one"
        raise CheckpointError(f"{path}: expected a file of weights, found {found}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: expected a file of weights, found none") from None
    content = _read(path, data)
    named: dict[str, Tensor] = {}
    unnamed: dict[str, list[Tensor]] = {}
    for name, value in _leaves(content, ""):
        if isinstance(value, Tensor):
            named[WRAPPERS.sub("", name)] = value
        else:
            unnamed[WRAPPERS.sub("", name)] = value
    entries = tuple(map(str, content)) if isinstance(content, Mapping) else ()
    return WeightsFile(named, unnamed, entries, hashlib.sha256(data).hexdigest())


def prefixes(names: Iterable[str], expected: Collection[str]) -> list[str]:
    """What stands before ``expected`` names, the most frequent prefix first; each is empty or ends in a dot."""
    found: Counter[str] = Counter()
    for name in names:
        starts = [0, *(place.end() for place in re.finditer(r"\.", name))]
        found.update(name[:start] for start in starts if name[start:] in expected)
    return sorted(found, key=lambda prefix: (-found[prefix], len(prefix)))


def below(named: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def choose(keys: Sequence[str]) -> str:
    """The key of the weights to take, of several that would do: those of the only average.

    Raises:
        CheckpointError: there is no average, or several.
    """
    last = [key for key in keys if AVERAGED.search(key.rpartition(".")[2])]
    anywhere = [key for key in keys if any(map(AVERAGED.search, key.split(".")))]
    for candidates in (keys, last, anywhere):
        if len(candidates) == 1:
            return candidates[0]
    named = ", ".join(key or "'' (no prefix)" for key in keys)
    raise CheckpointError(f"several entries hold weights that fit: {named}. Choose one with `key`")


def groups(names: Collection[str], among: Collection[str]) -> list[tuple[str, int]]:
    """How many of ``names`` each entry has: their parts up to the first in which the names ``among`` differ."""
    split = [name.split(".") for name in among]
    first, last = min(split, default=[]), max(split, default=[])
    depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)) + 1
    return Counter(".".join(name.split(".")[:depth]) for name in names).most_common()


def listed(parts: Sequence[str]) -> str:
    """The first few parts, and how many more there are."""
    more = [f"{len(parts) - MOST_SHOWN} more"] if len(parts) > MOST_SHOWN else []
    return ", ".join([*parts[:MOST_SHOWN], *more])


def _leaves(content: Any, name: str) -> Iterator[tuple[str, Tensor | list[Tensor]]]:
    """Tensors, and lists of them, at any depth."""
    if isinstance(content, Tensor) and name:
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list | tuple) and content and all(isinstance(value, Tensor) for value in content):
        yield name, list(content)
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _leaves(value, f"{name}.{number}" if name else str(number))


def _read(path: str, data: bytes) -> Any:
    try:
        if path.endswith(".safetensors") or data[8:9] == b"{":  # the header of safetensors, after its length
            return safetensors.torch.load(data)
        check_zip(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - of damaged files PyTorch raises whatever its parts do
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise CheckpointError(
                f"{path}: expected tensors and plain values, found {foreign[1]}, and code is never run: save the "
                "weights only, torch.save(model.state_dict(), FILE)"
            ) from None
        raise CheckpointError(f"{path}: expected a file of weights, found {one_line(error, 120)}") from None
