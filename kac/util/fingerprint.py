"""Fingerprints identify results by the options that determine them. New options do not change old fingerprints.

A field that has its neutral value is left out of the fingerprint. The neutral value is the default, unless the field
declares a different one. Fields without a default and fields named ``kind`` are always included. A new field therefore
changes no fingerprint until it is set. If you change a default, declare the old default as the neutral value:
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
    """Return the sha256 of the values as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def unhashed(default: Any, description: str, marks: dict[str, Any] | None = None, **constraints: Any) -> Any:
    """Return a field that is never in a fingerprint because it does not affect results, such as a worker count.

    ``marks`` are added to the field's ``json_schema_extra``, where other modules look for them.
    """
    return Field(default, description=description, json_schema_extra={"unhashed": True, **(marks or {})}, **constraints)


def hashed_fields(model: BaseModel) -> dict[str, Any]:
    """Return all fields that can be part of a fingerprint, including fields with neutral values, as JSON values."""
    fields = type(model).model_fields.items()
    return {name: _plain(getattr(model, name)) for name, field in fields if not _extra(field).get("unhashed")}


def hashed_values(model: BaseModel) -> dict[str, Any]:
    """Return the fields that are part of the model's fingerprint, as JSON values."""
    hashed = {}
    for name, plain in hashed_fields(model).items():
        if name == "kind" or not _is_neutral(type(model).model_fields[name], plain):
            value = getattr(model, name)
            hashed[name] = hashed_values(value) if isinstance(value, BaseModel) else plain
    return hashed


def with_neutral_values(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Fill in the neutral values of fields that are missing from ``values``, which an older version stored."""
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
