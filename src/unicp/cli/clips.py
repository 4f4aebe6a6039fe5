"""Properties of the clips of ``unicp batch`` that are known before any is made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..policies.config import Config
from . import calls, pipelines
from .model import Model

BYTES_PER_PIXEL = 0.1
"""A generous guess for compressed videos, for the check of the disk beforehand; other formats take more."""
RECORD_BYTES = 2**16


def expected_bytes(model: Model, call: Mapping[str, Any], suffix: str) -> int:
    """A guess at the size of a clip's files in bytes, from the call or else from the pipeline's defaults."""
    takes = inspect.signature(model.pipeline.__call__).parameters
    pixels = 1.0
    for words in (("width",), ("height",), calls.ARGUMENTS["--frames"]):
        default = next((takes[word].default for word in words if word in takes), None)
        value = next((call[word] for word in words if call.get(word)), default)
        pixels *= value if isinstance(value, int | float) else 512
    return math.ceil(pixels * BYTES_PER_PIXEL * (1 if suffix == ".mp4" else 4)) + RECORD_BYTES


def identity(model: Model) -> str:
    """The name of a model in the key of a clip: the same wherever and whenever the command is typed.

    A model of the hub is its name, whether the hub can be reached or not, and whatever was committed there since: a
    batch that goes on next day must find its clips. The commit is in the records.
    """
    if model.is_demo:
        return pipelines.DEMO
    folder = Path(model.source).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model.name


def absolute(config: Config | None) -> Config | None:
    """A config whose profiles are found from any current folder: workers may have another one."""
    if config is None:
        return None
    changed: dict[str, Any] = {}
    profile, stack = getattr(config, "profile", None), getattr(config, "stack", None)
    if profile is not None:
        changed["profile"] = str(Path(profile).absolute())
    if isinstance(stack, Config):
        changed["stack"] = absolute(stack)
    return config.replace(**changed) if changed else config


def anywhere(model: Model) -> Model:
    """A model whose folder is found from any current folder."""
    folder = Path(model.source).expanduser()
    return replace(model, source=str(folder.absolute())) if folder.is_dir() else model
