"""User code, imported by a path ``package.module:factory``."""

import importlib
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from kac.util.errors import ArgumentError, one_line

IMPORT_PATH = re.compile(r"[\w.]+:\w+")
"""The syntax of an import path."""


def find_factory(option: str, given: str) -> Callable[..., Any]:
    """Import a factory.

    Args:
        option: the argument in backquotes, for error messages.
        given: the import path.

    Raises:
        ArgumentError: the import fails.
    """
    module, _, name = given.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ArgumentError(
            f"{option} {given} cannot be imported ({describe_exception(error)}). Give package.module:factory."
        ) from error
    return factory


def make_module(option: str, given: str, factory: Callable[..., Any], **arguments: Any) -> nn.Module:
    """Call the factory at the import path ``given`` with ``arguments``, and return the module that it builds.

    Raises:
        ArgumentError: the factory fails, or returns something other than a module.
    """
    try:
        module = factory(**arguments)
    except Exception as error:
        raise ArgumentError(f"{option} {given} raised {describe_exception(error)}.") from error
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"{option} {given} returned {type(module).__name__}. It should return an nn.Module.")
    return module


def describe_exception(error: Exception) -> str:
    """Return an exception's type and its text on one line, without a period at the end."""
    text = one_line(error).rstrip(".")
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"
