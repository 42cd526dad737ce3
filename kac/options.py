"""Frozen option models whose errors are one line for the person who gave the options."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kac.errors import DistillKacError


class OptionError(DistillKacError):
    """An option is missing, unknown or out of range."""


class Options(BaseModel):
    """A frozen set of named values; unknown names and values out of range raise ``OptionError``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise OptionError(_sentence(dict(error.errors()[0]))) from None


def _sentence(entry: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in entry["loc"] if not isinstance(part, int)).replace("_", "-")
    message: str = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "extra_forbidden":
        return f"--{where}: unknown option: see --help"
    if entry["type"] == "missing":
        return f"--{where}: expected a value, found none: see --help"
    if not where:
        return message
    return f"--{where}: {message[0].lower()}{message[1:]}, found {entry['input']!r}"
