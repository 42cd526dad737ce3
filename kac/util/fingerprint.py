"""Fingerprints: the one way this project names content, made so that options can be added later.

A field of an option model enters a fingerprint unless it has its neutral value, which is its default; fields without
a default and those called ``kind`` always do. A field that is added later therefore changes no fingerprint until
somebody uses it. Whoever changes a default keeps the old one as the neutral value:
``Field(new, json_schema_extra={"neutral": old})``.
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from kac.util.options import nested_models


def fingerprint(values: dict[str, Any]) -> str:
    """sha256 of the values as canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def unhashed(default: Any, description: str, marks: dict[str, Any] | None = None, **constraints: Any) -> Any:
    """A field that says where, how fast or how much is made, and changes no sample of it.

    Args:
        marks: what other modules look for in the field.
    """
    extra = {"unhashed": True, **(marks or {})}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def hashed_fields(model: BaseModel) -> dict[str, Any]:
    """Every field that can enter a fingerprint with its value, those at their neutral values too, as plain values."""
    fields = type(model).model_fields.items()
    return {name: _plain(getattr(model, name)) for name, field in fields if not _extra(field).get("unhashed")}


def hashed_values(model: BaseModel) -> dict[str, Any]:
    """What of a model enters its fingerprint, as plain values."""
    entering = {}
    for name, plain in hashed_fields(model).items():
        if name == "kind" or not _is_neutral(type(model).model_fields[name], plain):
            value = getattr(model, name)
            entering[name] = hashed_values(value) if isinstance(value, BaseModel) else plain
    return entering


def with_neutral_values(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Values that were written before some fields were added, with these at their neutral values (not defaults)."""
    filled = dict(values)
    for name, field in model.model_fields.items():
        if name not in values and "neutral" in _extra(field):
            filled[name] = _extra(field)["neutral"]
        elif isinstance(values.get(name), dict) and len(nested := nested_models(field)) == 1:
            filled[name] = with_neutral_values(nested[0], values[name])
    return filled


def _plain(value: Any) -> Any:
    return hashed_fields(value) if isinstance(value, BaseModel) else to_jsonable_python(value)


def _is_neutral(field: FieldInfo, plain: Any) -> bool:
    neutral = _extra(field).get("neutral", field.get_default(call_default_factory=True))
    return neutral is not PydanticUndefined and bool(plain == _plain(neutral))


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}
