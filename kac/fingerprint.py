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


def fingerprint(values: dict[str, Any]) -> str:
    """sha256 of the values as canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def unhashed(default: Any, description: str, **constraints: Any) -> Any:
    """A field that changes where, how fast or how much is made, but nothing of what one sample of it is."""
    return Field(default, description=description, json_schema_extra={"unhashed": True}, **constraints)


def hashed_fields(model: BaseModel) -> dict[str, Any]:
    """Every field that can enter a fingerprint with its value, those at their neutral values too, as plain values."""
    names = [name for name, field in type(model).model_fields.items() if not _extra(field).get("unhashed")]
    values = {name: getattr(model, name) for name in names}
    return {
        name: hashed_fields(value) if isinstance(value, BaseModel) else to_jsonable_python(value)
        for name, value in values.items()
    }


def hashed_values(model: BaseModel) -> dict[str, Any]:
    """What of a model enters its fingerprint, as plain values."""
    values = hashed_fields(model)
    entering = [
        name for name in values if name == "kind" or not _is_neutral(type(model).model_fields[name], values[name])
    ]
    nested = {name: getattr(model, name) for name in entering}
    return {
        name: hashed_values(value) if isinstance(value, BaseModel) else values[name] for name, value in nested.items()
    }


def _is_neutral(field: FieldInfo, value: Any) -> bool:
    neutral = _extra(field).get("neutral", field.get_default(call_default_factory=True))
    if neutral is PydanticUndefined:  # a field without a default
        return False
    return bool(value == (hashed_fields(neutral) if isinstance(neutral, BaseModel) else to_jsonable_python(neutral)))


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}
