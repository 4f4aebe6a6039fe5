"""Clips to make, the interface of what makes them, and their outcomes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

KEY_LENGTH = 32


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One video to make. Can be pickled.

    Attributes:
        key: names everything that determines the video (:func:`key_of`); equal keys are the same video.
        name: name of its file, with suffix; its record has the same name with ``.json``.
        values: what the recipe needs besides prompt and seed; plain JSON values.
        group: clips of equal ``group`` may be made in one forward; ``None`` is always made alone.
        expected_bytes: an estimate of the files' size.
    """

    key: str
    name: str
    prompt: str
    seed: int
    values: Mapping[str, Any] = field(default_factory=dict)
    group: str | None = None
    expected_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A video that was made and not yet written.

    Attributes:
        frames: (F, H, W, 3), floats in [0, 1] or uint8.
        fps: frames per second.
        scale: every pixel is written as ``scale`` x ``scale``.
        record: the values of its JSON; file name, size and digest are added when it is written.
        fraction: share of the denoiser's operations that ran, from 0 to 1; ``None`` where unknown.
    """

    frames: Any
    fps: float
    scale: int
    record: dict[str, Any]
    fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one clip.

    Attributes:
        key: key of the clip.
        error: its error in one line; ``None`` if its files are on disk.
        seconds: seconds spent on it, writing included; for clips made together, its share.
        thumbnail: a small JPEG.
        bytes: size of the video's file.
        fraction: see :class:`Rendered`.
        warnings: warnings of unicp while it was made.
    """

    key: str
    error: str | None = None
    seconds: float = 0.0
    thumbnail: bytes | None = field(default=None, repr=False)
    bytes: int = 0
    fraction: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One of several processes that make each clip together. Can be pickled.

    Attributes:
        number: 0 is the one whose videos are written.
        size: how many they are.
        meeting: a path, new for these processes, of a file by which they find each other.
    """

    number: int
    size: int
    meeting: str


class Maker(Protocol):
    """A loaded model."""

    def make(self, clips: Sequence[Clip]) -> Sequence[Rendered | Exception]:
        """Make the videos of clips of one group, in one forward if there are several; a failed clip gives its error.

        May raise where all failed: clips of a batch are then tried one by one.
        """
        ...

    def document(self, values: Mapping[str, Any]) -> str:
        """The text of a record."""
        ...


class Recipe(Protocol):
    """How clips are made. Is pickled and sent to the workers."""

    def load(self, device: str | None, rank: Rank | None = None) -> Maker:
        """Load the model.

        Args:
            device: device to load it on; ``None`` means the worker's own.
            rank: rank of this process, where several make each clip together; all of them load the model.
        """
        ...


def key_of(values: Mapping[str, Any]) -> str:
    """A key for plain JSON values: equal values have equal keys, on any machine and in any order.

    >>> key_of({"a": 1, "b": [2.0]}) == key_of({"b": [2.0], "a": 1})
    True
    """
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def groups(clips: Sequence[Clip], size: int) -> list[list[Clip]]:
    """Lists of clips to make together, at most ``size`` of one group, in the order of each group's first clip."""
    found: list[list[Clip]] = []
    opened: dict[str, list[Clip]] = {}
    for clip in clips:
        group = opened.get(clip.group) if clip.group is not None else None
        if group is None or len(group) >= size:
            group = []
            found.append(group)
            if clip.group is not None:
                opened[clip.group] = group
        group.append(clip)
    return found
