"""Compatibility with stores that other versions of this project wrote.

A field that an older version did not write has its neutral value. Files of a newer version raise ``NewerVersion``
instead of being reported as damaged.
"""

import json
from typing import Any, TypeVar

from kac.util.errors import ArgumentError, UnknownArgument, one_line
from kac.util.fingerprint import with_neutral_values
from kac.util.options import Options
from pipeline.store.layout import StoreError

SCHEMA_VERSION = 1

Model = TypeVar("Model", bound=Options)


class NewerVersion(StoreError):
    """The file was written by a newer version of this project."""


def check_version(where: str, version: Any) -> None:
    """Check that this version can read the file.

    Raises:
        NewerVersion: a newer version wrote the file.
        ValueError: ``version`` is not an integer.
    """
    if not isinstance(version, int):
        raise ValueError("its schema_version is not an integer")
    if version > SCHEMA_VERSION:
        raise NewerVersion(
            f"{where} has schema version {version}, but this version of distillkac reads up to {SCHEMA_VERSION}. "
            "Install a newer distillkac."
        )


def parse(where: str, model: type[Model], text: str | bytes) -> Model:
    """Parse a model from the JSON in a file.

    Raises:
        NewerVersion: the JSON has unknown fields or a newer schema_version.
        ValueError: the text is not a JSON object, or a field is missing or wrong.
    """
    values = _json_object(text)
    if "schema_version" in model.model_fields:
        check_version(where, values.get("schema_version"))
    try:
        return model(**with_neutral_values(model, values))
    except ArgumentError as error:
        # A newer version writes all fields of this version that are not None. If one of them is missing, then the
        # unknown field is a known one with a damaged name.
        always_written = {name for name, field in model.model_fields.items() if field.default is not None}
        if isinstance(error, UnknownArgument) and always_written <= values.keys():
            raise NewerVersion(
                f"{where} was written by a newer version of distillkac: it has the unknown field {error.name}. "
                "Install a newer distillkac."
            ) from None
        raise ValueError(one_line(error, 160)) from None


def _json_object(text: str | bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        raise ValueError("it is empty, truncated or not JSON") from None
    if not isinstance(values, dict):
        kinds = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
        raise ValueError(f"it holds {kinds.get(type(values), 'a number')} instead of a JSON object")
    return values
