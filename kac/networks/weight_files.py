"""Read weights from third-party files. Only tensors and plain values are read, and no code in a file is run."""

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
from kac.util.text import shorten

WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that torch.compile, FSDP and activation checkpointing insert into tensor names, at any depth."""

AVERAGED = re.compile(r"(^|_)(ema|shadow|average|averaged|swa)(_|$)", re.IGNORECASE)  # names of averaged weights
MOST_SHOWN = 6  # maximum number of entries listed in a message


class WeightsFile(NamedTuple):
    """All tensors in a file. Nested tensors are named by the keys that lead to them, joined by dots."""

    named: dict[str, Tensor]
    unnamed: dict[str, list[Tensor]]  # lists of tensors without names, by entry
    entries: tuple[str, ...]  # keys at the top level of the file
    sha256: str

    def describe(self) -> str:
        """Describe the content of the file for an error message."""
        if not self.named and not self.unnamed:
            return f"no tensors in {shorten(self.entries, MOST_SHOWN)}" if self.entries else "no named entries"
        example = "".join(f", such as {name} {list(value.shape)}" for name, value in list(self.named.items())[:1])
        total = len(self.named) + sum(map(len, self.unnamed.values()))
        return f"{total} tensors: {self.describe_entries(self.named)}{example}"

    def describe_entries(self, names: Collection[str], without: str | None = None) -> str:
        """List the entries of the tensors ``names``, and all lists except ``without``, each with its number of tensors.

        The entry of a tensor is its name up to and including the first part that differs between names in the file.
        """
        split = [name.split(".") for name in self.named]
        first, last = min(split, default=[]), max(split, default=[])
        depth = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)) + 1
        counts = Counter(".".join(name.split(".")[:depth]) for name in names)
        parts = [f"{name} ({count})" for name, count in counts.most_common()]
        lists = [(name, tensors) for name, tensors in self.unnamed.items() if name != without]
        parts += [f"{name or 'a list'} ({len(tensors)} without names)" for name, tensors in lists]
        return shorten(parts, MOST_SHOWN)


def read_weights(path: str) -> WeightsFile:
    """Return the tensors in a ``torch.save`` or safetensors file (local or s3://), loaded on the CPU.

    Raises ``CheckpointError`` if the file is missing or damaged, or contains anything but tensors and plain values.
    """
    try:
        data = files.read_bytes(path)
    except IsADirectoryError:
        endings = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
        inside = sorted(name for name in files.list_sizes(path) if name.endswith(endings))
        advice = f"one of its files: {shorten(inside, MOST_SHOWN)}" if inside else "a weights file"
        raise CheckpointError(f"{path} is a folder. Give {advice}.") from None
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist. Give a weights file.") from None
    content = _load(path, data)
    found = {WRAPPERS.sub("", name): value for name, value in _flatten(content, "")}
    named = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    unnamed = {name: value for name, value in found.items() if not isinstance(value, Tensor)}
    entries = tuple(map(str, content)) if isinstance(content, Mapping) else ()
    return WeightsFile(named, unnamed, entries, hashlib.sha256(data).hexdigest())


def _load(path: str, data: bytes) -> Any:
    try:
        if path.endswith(".safetensors") or data[8:9] == b"{":  # a safetensors file starts with an 8-byte length
            return safetensors.torch.load(data)
        check_zip(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - PyTorch may raise any error for a damaged file
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} contains the Python object {forbidden[1]}, which cannot be loaded without running code. Save "
                "only the weights: torch.save(model.state_dict(), FILE)."
            ) from None
        raise CheckpointError(f"{path} is not a readable weights file ({one_line(error, 120)}).") from None


def _flatten(content: Any, name: str) -> Iterator[tuple[str, Tensor | list[Tensor]]]:
    """Yield the name and value of every tensor, and of every list of tensors, at any depth in ``content``."""
    if isinstance(content, Tensor):
        if name:
            yield name, content
    elif isinstance(content, list | tuple) and content and all(isinstance(value, Tensor) for value in content):
        yield name, list(content)
    elif isinstance(content, Mapping | list | tuple):
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from _flatten(value, f"{name}.{key}" if name else str(key))


def find_prefixes(names: Iterable[str], expected: Collection[str]) -> list[str]:
    """Return the prefixes of ``expected`` names in ``names``, most frequent first. Each is empty or ends in a dot."""
    counts: Counter[str] = Counter()
    for name in names:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        counts.update(name[:start] for start in starts if name[start:] in expected)
    return sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix)))


def choose_key(keys: Sequence[str]) -> str:
    """Return the only key, or the only key of averaged weights. Raises ``CheckpointError`` if neither is unique."""
    last = [key for key in keys if AVERAGED.search(key.rpartition(".")[2])]
    anywhere = [key for key in keys if any(map(AVERAGED.search, key.split(".")))]
    for candidates in (keys, last, anywhere):
        if len(candidates) == 1:
            return candidates[0]
    names = ", ".join(key or "'' (no prefix)" for key in keys)
    raise CheckpointError(f"several entries contain weights that fit: {names}. Choose one with `key`.")
