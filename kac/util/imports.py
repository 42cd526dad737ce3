"""Modules that others wrote, by an import path ``package.module:factory``."""

import importlib
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from kac.util.errors import ArgumentError, one_line

IMPORT_PATH = re.compile(r"[\w.]+:\w+")
"""What looks like one: package.module:factory."""


def find_factory(option: str, given: str) -> Callable[..., Any]:
    """What is found at an import path, which ``option`` gave.

    Raises:
        ArgumentError: nothing can be imported there.
    """
    module, _, name = given.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ArgumentError(f"{option} {given}: expected package.module:factory, found {one_line(error)}") from error
    return factory


def make_module(option: str, given: str, factory: Callable[..., Any], **arguments: Any) -> nn.Module:
    """What the factory at the import path ``given`` makes of ``arguments``.

    Raises:
        ArgumentError: it fails, or makes no module.
    """
    try:
        made = factory(**arguments)
    except Exception as error:
        found = f"{type(error).__name__}: {one_line(error)}"
        raise ArgumentError(f"{option} {given}: expected it to make an nn.Module, found {found}") from error
    if not isinstance(made, nn.Module):
        raise ArgumentError(f"{option} {given}: expected an nn.Module of it, found {type(made).__name__}")
    return made
