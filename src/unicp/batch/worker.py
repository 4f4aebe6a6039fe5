"""A worker loads the model once, makes clips, and puts their files in place whole."""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UnicpWarning, first_line
from ..files import video, whole
from .clips import Clip, Maker, Outcome, Rank, Recipe, Rendered
from .manifest import record_path

THUMBNAIL = 160
"""Pixels of a thumbnail's width."""
BROKEN_DEVICE_MESSAGES = (
    "CUDA error",
    "device-side assert",
    "HIP error",
    "illegal memory access",
    "NCCL error",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
)
"""Parts of error messages after which a process can compute nothing more, on its GPU or together with others."""


def is_broken(outcomes: Sequence[Outcome]) -> bool:
    """Whether the worker of these outcomes has to be replaced."""
    return any(words in outcome.error for outcome in outcomes if outcome.error for words in BROKEN_DEVICE_MESSAGES)


def thumbnail(frames: Any) -> bytes:
    """The middle frame of a video as a small JPEG."""
    from PIL import Image

    picture = Image.fromarray(video.to_uint8(frames[len(frames) // 2 : len(frames) // 2 + 1])[0])
    height = max(1, round(picture.height * THUMBNAIL / picture.width))
    enlarged = picture.width < THUMBNAIL
    picture = picture.resize((THUMBNAIL, height), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=75)
    return data.getvalue()


def _flush(path: Path) -> None:
    """Flush a file to the disk, so that it does not get its name before its content."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


class Worker:
    """A loaded model and a place for its clips.

    Args:
        recipe: how clips are made.
        folder: folder of the clips. It has to exist; workers on several machines share it.
        stage: a folder for unfinished files, on the same file system, for this worker alone.
        device: device to work on; ``None`` leaves the choice to the recipe.
        rank: rank of this process, where several make each clip together. All make the clips; only rank 0 writes files.

    Raises:
        Exception: whatever loading the model raises.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, stage: Path, device: str | None = None, rank: Rank | None = None
    ) -> None:
        if not stage.is_dir():
            raise FileNotFoundError(f"this worker does not see {folder}: all machines of a batch need to share it")
        self._folder, self._stage = folder, stage
        self._writes = rank is None or rank.number == 0
        self._maker: Maker = recipe.load(device) if rank is None else recipe.load(device, rank)

    def make(self, clips: Sequence[Clip]) -> list[Outcome]:
        """Make clips of one group and write them. An error of one clip does not stop the others."""
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UnicpWarning)
            made = self._render(clips)
        share = (time.perf_counter() - began) / len(clips)
        told = tuple(dict.fromkeys(str(each.message) for each in caught))
        return [
            self._write(clip, result, share, told) if isinstance(result, Rendered) else _failed(clip, result, share)
            for clip, result in zip(clips, made, strict=True)
        ]

    def _render(self, clips: Sequence[Clip]) -> list[Rendered | Exception]:
        try:
            return list(self._maker.make(clips))
        except Exception as error:
            if len(clips) == 1 or is_broken([_failed(clips[0], error, 0.0)]):
                return [error] * len(clips)
        # One of them may be at fault, or there is not enough memory for so many at once.
        return [result for clip in clips for result in self._render([clip])]

    def _write(self, clip: Clip, made: Rendered, seconds: float, told: tuple[str, ...]) -> Outcome:
        if not self._writes:
            return Outcome(key=clip.key, seconds=seconds)
        began = time.perf_counter()
        target = self._folder / clip.name
        part = self._stage / f"{clip.key}{target.suffix}"
        note = self._stage / f"{clip.key}.json"
        try:
            try:
                video.write(made.frames, part, suffix=target.suffix.lower(), fps=made.fps, scale=made.scale)
                size = part.stat().st_size
                seconds += time.perf_counter() - began
                about = {"key": clip.key, "seconds": seconds, "computed_fraction": made.fraction}
                values = {**made.record, "clip": {**about, **made.record.get("clip", {})}}
                values["video"] = {**made.record.get("video", {}), "file": clip.name, "bytes": size}
                values["video"]["sha256"] = whole.digest(part)
                if told:
                    values["warnings"] = list(told)
                note.write_text(self._maker.document(values), "utf-8")
                small = thumbnail(made.frames)
                for path in (part, note):
                    _flush(path)
                # The record comes last: if it is there, the video is whole.
                part.replace(target)
                note.replace(record_path(target))
            finally:
                part.unlink(missing_ok=True)
                note.unlink(missing_ok=True)
        except Exception as error:
            return _failed(clip, error, seconds)
        return Outcome(
            key=clip.key, seconds=seconds, bytes=size, fraction=made.fraction, thumbnail=small, warnings=told
        )


def _failed(clip: Clip, error: BaseException, seconds: float) -> Outcome:
    return Outcome(key=clip.key, error=first_line(error), seconds=seconds)
