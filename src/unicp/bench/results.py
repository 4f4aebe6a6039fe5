"""Measurements as plain data: results by run, points by setting, figures over prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .quality import CAPTION, MAX_PSNR_DB
from .statistics import Estimate


@dataclass(frozen=True, kw_only=True)
class Result:
    """One timed run.

    Attributes:
        prompt, repeat: numbers of the prompt and of the repeat, from 0.
        loop_seconds, total_seconds: seconds of the denoising loop, and of the whole call.
        beside: the same two of the unaccelerated run in the same round; ``None`` for that run itself.
        peak_bytes: most memory of the denoising loop beyond what was held before, on a CUDA device.
        cache_bytes: what unicp kept for later steps; ``None`` for other methods, which do not report it.
        quality: figures of :data:`~unicp.bench.quality.MEASURES` against the unaccelerated video; empty for that one.
        caption: which parts of the caption are right (demo model only).
        shape: shape of the video (F, H, W, 3).
        video: the video as a sheet of frames (WebP).
        raw: for the unaccelerated run, all frames and latents (npz).
    """

    prompt: int
    repeat: int
    loop_seconds: float
    total_seconds: float
    peak_bytes: int | None
    cache_bytes: int | None
    quality: dict[str, float | None]
    caption: dict[str, bool] | None
    shape: tuple[int, ...]
    beside: dict[str, float] | None = None
    video: bytes | None = field(default=None, repr=False)
    raw: bytes | None = field(default=None, repr=False)

    @property
    def seconds(self) -> dict[str, float]:
        """``loop_seconds`` and ``total_seconds``."""
        return {"loop_seconds": self.loop_seconds, "total_seconds": self.total_seconds}

    def with_blobs(self, video: bytes, raw: bytes | None) -> Result:
        return dataclasses.replace(self, video=video, raw=raw)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the pictures; infinities as text."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["quality"] = {name: _text(value) for name, value in self.quality.items()}
        values["shape"] = list(self.shape)
        return {name: value for name, value in values.items() if name not in ("video", "raw")}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], prompt: int, repeat: int, video: bytes | None = None, raw: bytes | None = None
    ) -> Result:
        rest = {**values, "prompt": prompt, "repeat": repeat, "shape": tuple(values["shape"])}
        rest["quality"] = {k: None if v is None else float(v) for k, v in values["quality"].items()}
        return cls(**rest, video=video, raw=raw)


def _text(value: float | None) -> float | str | None:
    return str(value) if value is not None and not math.isfinite(value) else value


@dataclass(frozen=True)
class Failure:
    """A setting that did not apply or broke, and its own error."""

    method: str
    label: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of a method, with all of its runs.

    Attributes:
        settings: everything that the method was given.
        observed: what was seen in the discarded run of the first prompt (:class:`~unicp.bench.observe.Observation`).
    """

    method: str
    label: str
    ours: bool
    source: str
    note: str
    settings: dict[str, Any]
    results: tuple[Result, ...]
    observed: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.method} {self.label}".strip()

    def measured(self, name: str) -> list[float]:
        """A quality figure, one value per prompt (of the first repeat); an infinite PSNR counts as 100 dB."""
        values = [r.quality.get(name) for r in sorted(self.results, key=lambda r: r.prompt) if r.repeat == 0]
        return [min(v, MAX_PSNR_DB) if "psnr" in name else v for v in values if v is not None]

    def caption_right(self) -> dict[str, float] | None:
        """Shares of the prompts whose colour, count, direction and speed are right in the video."""
        checks = [r.caption for r in self.results if r.repeat == 0 and r.caption is not None]
        if not checks:
            return None
        return {name: sum(check[name] for check in checks) / len(checks) for name in CAPTION}

    @property
    def peak_bytes(self) -> int | None:
        """Most memory of the denoising loop: on a CUDA device as allocated, else as tensors of the first prompt."""
        most = max((r.peak_bytes for r in self.results if r.peak_bytes is not None), default=None)
        return self.observed.get("peak_bytes") if most is None else most

    @property
    def cache_bytes(self) -> int | None:
        return max((r.cache_bytes for r in self.results if r.cache_bytes is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of a point over all prompts."""

    method: str
    label: str
    ours: bool
    loop_speedup: Estimate
    total_speedup: Estimate
    loop_seconds: float
    computed_fraction: float | None
    quality: dict[str, Estimate | None]
    caption: dict[str, float] | None
    peak_bytes: int | None
    cache_bytes: int | None

    @property
    def name(self) -> str:
        return f"{self.method} {self.label}".strip()

    @property
    def identical(self) -> bool:
        """Whether every video equals the unaccelerated one."""
        psnr = self.quality.get("psnr")
        return psnr is not None and psnr.worst >= MAX_PSNR_DB

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Compared(Protocol):
    """The part of a comparison that the report reads."""

    @property
    def baseline(self) -> Point: ...
    @property
    def points(self) -> tuple[Point, ...]: ...
    @property
    def failures(self) -> tuple[Failure, ...]: ...
    @property
    def prompts(self) -> tuple[str | None, ...]: ...
    @property
    def steps(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def provenance(self) -> dict[str, Any]: ...
    def rows(self) -> list[Row]: ...
    def curves(self) -> dict[str, list[Row]]: ...
    def at_speedup(self, speedup: float, measure: str = "psnr", worst: bool = False) -> dict[str, float | None]: ...
    def beside(self, result: Result) -> dict[str, float]: ...
