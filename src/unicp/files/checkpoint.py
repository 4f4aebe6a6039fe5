"""A JSON file with the results of a long measurement so far, from which it can resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UnicpError
from .whole import staged


class Checkpoint:
    """A file of plain values. Without a path, nothing is saved or loaded.

    Args:
        path: path of the file, or ``None``.
        identity: identifies the measurement, so that the file of another one is refused.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: str) -> None:
        self.path = Path(path) if path is not None else None
        self.identity = identity

    def save(self, state: dict[str, Any]) -> None:
        """Write the state, whole or not at all."""
        if self.path is not None:
            with staged(self.path) as part:
                part.write_text(json.dumps({"identity": self.identity, **state}), "utf-8")

    def load(self) -> dict[str, Any] | None:
        """The saved state, or ``None`` if there is none.

        Raises:
            UnicpError: the file is something else, or belongs to another tuning.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            saved: dict[str, Any] = json.loads(self.path.read_text("utf-8"))
            identity = saved.pop("identity")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UnicpError(f"{self.path} is no unfinished tuning; remove the file") from error
        if identity != self.identity:
            raise UnicpError(
                f"{self.path} holds an unfinished tuning of another model, prompts or arguments; finish that one, or "
                "remove the file"
            )
        return saved

    def remove(self) -> None:
        """Remove the file, if it is there."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
