"""A pipeline that was found, and its components, before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import demo
from ..errors import UnicpError


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline that was found; its weights are not loaded.

    Attributes:
        name: as the user wrote it.
        source: the folder or hub id from which diffusers loads it.
        index: its ``model_index.json``.
        revision: commit on the hub, ``None`` for folders.
        offline: whether the hub cannot be reached, so that the cache has to serve.
    """

    name: str
    source: str
    index: dict[str, Any]
    revision: str | None = None
    offline: bool = False

    @property
    def is_demo(self) -> bool:
        return Path(self.source) == demo.path()

    @property
    def pipeline(self) -> Any:
        """The pipeline's class."""
        import diffusers

        name = self.index.get("_class_name")
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
        if not isinstance(found, type):
            raise UnicpError(
                f"{self.name} is a pipeline of class {name}, which diffusers {diffusers.__version__} does not have; "
                "update diffusers, or name another model"
            )
        return found

    def denoisers(self) -> Iterator[tuple[str, str]]:
        """Name and class name of each component that can be accelerated."""
        from ..hosts.diffusers.components import DENOISERS  # loads torch

        for name in DENOISERS:
            entry = self.index.get(name)
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
                yield name, entry[1]
