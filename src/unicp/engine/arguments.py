"""The arguments of a module's forward, by name."""

from __future__ import annotations

import inspect
from typing import Any


def parameters(module: Any) -> list[str]:
    """Names of the arguments that a module's forward takes, without ``self``."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def named(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, however they were passed."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
