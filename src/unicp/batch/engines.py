"""The interface between the driver and an engine, which starts workers, gives them clips and collects outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .clips import Clip, Outcome, Recipe

READY, MADE, DIED, UNLOADABLE = "ready", "made", "died", "unloadable"


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message about a worker.

    Attributes:
        kind: ``ready``: its model is loaded. ``made``: it made clips. ``died``: its process is gone, and
            :meth:`Engine.restart` may be called. ``unloadable``: it cannot load the model, and another try is no use.
        outcomes: outcomes of the clips that it was given, if it made them.
        error: why it died or cannot load, in one line.
    """

    worker: int
    kind: str
    outcomes: tuple[Outcome, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every engine needs to start workers.

    Attributes:
        folder: absolute path of the folder of the clips.
        stage: folder for unfinished files; it exists.
        workers: number of workers, at least one.
    """

    recipe: Recipe
    folder: Path
    stage: Path
    workers: int


class Engine(Protocol):
    """Runs workers, numbered from 0. A worker gets clips one group at a time, so no queue builds up."""

    def start(self) -> None:
        """Start all workers; they report when they are ready."""
        ...

    def submit(self, worker: int, clips: Sequence[Clip]) -> None:
        """Give a group of clips to a worker that is ready and has none."""
        ...

    def wait(self, seconds: float) -> list[Message]:
        """The next messages, as soon as there are any; empty after ``seconds``."""
        ...

    def restart(self, worker: int) -> None:
        """Replace a worker that died."""
        ...

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        ...
