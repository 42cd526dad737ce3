"""What other versions of this project wrote: read where that is possible, and otherwise refused for the right reason.

Older: a field that it did not have yet is at its neutral value. Newer: nothing is damaged, a newer distillkac reads it.
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
    """A newer version wrote it."""


def check_version(where: str, version: Any) -> None:
    """Refuse what a newer version of this project wrote.

    Raises:
        NewerVersion: it did. ValueError: this is no version.
    """
    if not isinstance(version, int):
        raise ValueError("a schema_version that is not a whole number")
    if version > SCHEMA_VERSION:
        raise NewerVersion(
            f"{where}: expected store schema version {SCHEMA_VERSION} or older, found {version}: use a newer distillkac"
        )


def parse(where: str, model: type[Model], text: str | bytes) -> Model:
    """A model from its JSON, as files hold it.

    Raises:
        NewerVersion: it has fields that this version does not have, or a newer schema_version.
        ValueError: it is no JSON object, or a field is missing or wrong; the message says what was found.
    """
    values = _json_object(text)
    if "schema_version" in model.model_fields:
        check_version(where, values.get("schema_version"))
    try:
        return model(**with_neutral_values(model, values))
    except ArgumentError as error:
        found = one_line(error, 160)
        # A newer version writes all fields of this one too, but for those that are None: where one is missing, its name
        # was damaged.
        written = {name for name, field in model.model_fields.items() if field.default is not None}
        if isinstance(error, UnknownArgument) and written <= values.keys():
            raise NewerVersion(
                f"{where}: expected fields that this version knows, found {error.name}: a newer version wrote it: "
                "use a newer distillkac"
            ) from None
        raise ValueError(found) from None


def _json_object(text: str | bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        raise ValueError("no JSON: empty, cut short or damaged text") from None
    if not isinstance(values, dict):
        kinds = {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
        raise ValueError(f"{kinds.get(type(values), 'a number')} in place of a JSON object")
    return values
