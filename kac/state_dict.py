"""State dicts in files that others wrote. Nothing in them is run: only tensors and plain values are read."""

import hashlib
import io
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from kac import files
from kac.errors import CheckpointError, one_line

AVERAGED = ("ema_model", "ema", "model_ema", "ema_state_dict")
"""Entries that are taken before others: averaged weights are what is evaluated."""


class StateDict(NamedTuple):
    """Weights by name, and the file that they are from."""

    weights: dict[str, Tensor]
    key: str | None  # where in the file they are; None: they are the file
    sha256: str  # of the file


def read_state_dict(path: str, key: str | None = None) -> StateDict:
    """The weights in a file of ``torch.save`` or of safetensors (local or s3://), on the CPU.

    Args:
        key: where in the file they are; by default the file is a state dict, or has one, or one of averaged weights.

    Raises:
        CheckpointError: no such file, something else than tensors and plain values in it, or no state dict, or several.
    """
    try:
        data = files.read_bytes(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CheckpointError(f"{path}: expected a file of weights, found none") from None
    content, sha256 = _read(path, data), hashlib.sha256(data).hexdigest()
    if key is None and _is_state_dict(content):
        return StateDict(dict(content), None, sha256)
    entries = {str(name): value for name, value in content.items()} if isinstance(content, Mapping) else {}
    chosen = key if key is not None else _only(path, entries)
    if chosen not in entries or not _is_state_dict(entries[chosen]):
        raise CheckpointError(f"{path}: expected a state dict under --key {chosen}, found {_told(entries)}")
    return StateDict(dict(entries[chosen]), chosen, sha256)


def _read(path: str, data: bytes) -> Any:
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - of damaged files PyTorch raises whatever its parts do
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise CheckpointError(
                f"{path}: expected tensors and plain values, found {foreign[1]}, and code is never run: save the "
                "weights alone, torch.save(model.state_dict(), FILE)"
            ) from None
        raise CheckpointError(f"{path}: expected a file of weights, found {one_line(error, 120)}") from None


def _only(path: str, entries: Mapping[str, Any]) -> str:
    state_dicts = [name for name, value in entries.items() if _is_state_dict(value)]
    averaged = [name for name in state_dicts if name in AVERAGED]
    for candidates in (averaged, state_dicts):
        if len(candidates) == 1:
            return candidates[0]
    raise CheckpointError(f"{path}: expected one state dict, found {_told(entries)}: choose one with --key")


def _told(entries: Mapping[str, Any]) -> str:
    named = [name for name, value in entries.items() if _is_state_dict(value)]
    if named:
        return f"state dicts under {', '.join(named)}"
    return f"no state dict among {', '.join(list(entries)[:10])}" if entries else "no mapping of names"


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(part, Tensor) for name, part in value.items())
    )
