"""Idempotent outputs: a folder belongs to one spec, is finished or is gone on with, and refuses another spec.

OUT/spec.json      the resolved spec and its fingerprint, written before the work starts
OUT/<marker>       written last; with the same fingerprint it says that the work is done
"""

import json
from typing import Any

from kac import files
from kac.errors import DistillKacError
from pipeline.config import Spec

SPEC_FILE = "spec.json"


def claim(out: str, spec: Spec, marker: str, **content: Any) -> bool:
    """Take the folder ``out`` for what ``spec`` makes from inputs of this ``content``.

    Returns:
        True if it is already complete.

    Raises:
        DistillKacError: the folder belongs to another spec, or cannot be written to.
    """
    mine = spec.fingerprint(**content)
    done = _read_json(files.join(out, marker))
    begun = _read_json(files.join(out, SPEC_FILE))
    for found in (done, begun):
        if found is not None and found.get("fingerprint") != mine:
            difference = _difference({**spec.identity(), **content}, (begun or {}).get("identity", {}))
            raise DistillKacError(
                f"{out}: expected a new folder or one of this spec, found one of another spec{difference}: "
                "choose another --out, or remove it"
            )
    if done is not None:
        return True
    files.check_writable(out)
    record = {
        "stage": type(spec).__name__,
        "fingerprint": mine,
        "identity": {**spec.identity(), **content},
        "options": spec.model_dump(mode="json"),
    }
    files.write_bytes(files.join(out, SPEC_FILE), json.dumps(record, indent=2).encode())
    return False


def _read_json(path: str) -> dict[str, Any] | None:
    try:
        raw = files.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        values = json.loads(raw)
    except ValueError as error:
        raise DistillKacError(f"{path}: expected JSON, found {error}: remove the folder and start again") from None
    return values if isinstance(values, dict) else {}


def _difference(mine: dict[str, Any], found: dict[str, Any]) -> str:
    flat_mine, flat_found = flatten(mine), flatten(found)
    parts = [
        f"{name.replace('_', '-')} is {flat_found[name]}, not {value}"
        for name, value in flat_mine.items()
        if name in flat_found and flat_found[name] != value
    ]
    return f" ({'; '.join(parts[:4])})" if parts else ""


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
