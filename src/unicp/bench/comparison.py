"""What a comparison found: results by run, points by setting, and figures over prompts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..video import staged
from .quality import CAPTION, HIGHEST_PSNR, MEASURES
from .statistics import Estimate, estimate, interpolate, speedups


@dataclass(frozen=True, kw_only=True)
class Result:
    """One timed run.

    Attributes:
        prompt, repeat: which one.
        loop_seconds, total_seconds: denoising loop, and the whole call.
        beside: both of the unaccelerated run that was made in the same round; ``None`` for that one.
        peak_bytes: most memory of the denoising loop beyond what was held before, on a CUDA device.
        cache_bytes: what unicp kept for later steps; ``None`` for other methods, which do not say.
        quality: figures of :data:`~unicp.bench.quality.MEASURES` against the unaccelerated video; empty for that one.
        caption: what of the caption is right (demo model only).
        shape: of the video (F, H, W, 3).
        video, raw: the video as a sheet of frames (WebP); of the unaccelerated one all frames and latents (npz).
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
        """A quality figure, one value a prompt (of the first repeat); an infinite PSNR counts as 100 dB."""
        values = [r.quality.get(name) for r in sorted(self.results, key=lambda r: r.prompt) if r.repeat == 0]
        return [min(v, HIGHEST_PSNR) if "psnr" in name else v for v in values if v is not None]

    def caption_right(self) -> dict[str, float] | None:
        """Shares of the prompts whose colour, count, direction and speed are seen right."""
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
        """Every video is the unaccelerated one."""
        psnr = self.quality.get("psnr")
        return psnr is not None and psnr.worst >= HIGHEST_PSNR

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What :func:`unicp.compare` returns. ``print`` shows a table; :meth:`report` writes the page."""

    baseline: Point
    points: tuple[Point, ...]
    failures: tuple[Failure, ...]
    prompts: tuple[str | None, ...]
    steps: int
    repeats: int
    seed: int
    notes: tuple[str, ...]
    provenance: dict[str, Any]

    def rows(self) -> list[Row]:
        """The figures of every point, in the order in which the methods were asked for."""
        return list(self._rows)

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        return tuple(self._row(point) for point in self.points)  # once: the intervals are resampled

    def _row(self, point: Point) -> Row:
        def faster(kind: str) -> Estimate:
            slow = [[self.beside(result)[kind] for result in of_one] for of_one in runs]
            fast = [[result.seconds[kind] for result in of_one] for of_one in runs]
            found = estimate(speedups(slow, fast), middle="median")
            assert found is not None
            return found

        runs = [[r for r in point.results if r.prompt == number] for number in range(len(self.prompts))]
        seconds = [result.loop_seconds for result in point.results]
        flops, all_flops = point.observed.get("flops"), self.baseline.observed.get("flops")
        return Row(
            method=point.method,
            label=point.label,
            ours=point.ours,
            loop_speedup=faster("loop_seconds"),
            total_speedup=faster("total_seconds"),
            loop_seconds=sorted(seconds)[len(seconds) // 2],
            computed_fraction=flops / all_flops if flops is not None and all_flops else None,
            quality={m.name: estimate(point.measured(m.name), higher=m.higher) for m in MEASURES},
            caption=point.caption_right(),
            peak_bytes=point.peak_bytes,
            cache_bytes=point.cache_bytes,
        )

    def beside(self, result: Result) -> dict[str, float]:
        """Seconds of the unaccelerated run that a run's speed-up is over."""
        if result.beside is not None:
            return result.beside
        base = self.baseline.results
        return next(r.seconds for r in base if (r.prompt, r.repeat) == (result.prompt, result.repeat))

    def curves(self) -> dict[str, list[Row]]:
        """The points of each method, slowest first."""
        found: dict[str, list[Row]] = {}
        for row in self.rows():
            found.setdefault(row.method, []).append(row)
        return {name: sorted(rows, key=lambda row: row.loop_speedup.value) for name, rows in found.items()}

    def at_speedup(self, speedup: float, measure: str = "psnr", worst: bool = False) -> dict[str, float | None]:
        """A quality figure of each method at the same speed, or faster.

        It is read off the line between the method's points. Where the slowest of them is faster than asked, that one
        counts: nobody is behind for not having been measured slower. Beyond the fastest one there is ``None``.
        Points whose videos are identical to the unaccelerated ones have no PSNR to draw a line to, and are left out.

        Args:
            speedup: of the denoising loop.
            measure: name of one of the measures.
            worst: of the worst prompt, instead of the mean.
        """
        found: dict[str, float | None] = {}
        for name, rows in self.curves().items():
            known = [(r, e) for r in rows if not r.identical and (e := r.quality.get(measure)) is not None]
            points = [(r.loop_speedup.value, e.worst if worst else e.value) for r, e in known]
            slowest = min(points, default=(speedup, None))
            found[name] = slowest[1] if slowest[0] > speedup else interpolate(points, speedup)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the videos; :meth:`from_dict` reads them."""

        def point(one: Point) -> dict[str, Any]:
            values = {item.name: getattr(one, item.name) for item in dataclasses.fields(one)}
            return {**values, "results": [result.to_dict() for result in one.results]}

        return {
            "unicp_comparison": 1,
            "prompts": list(self.prompts),
            "steps": self.steps,
            "repeats": self.repeats,
            "seed": self.seed,
            "notes": list(self.notes),
            "provenance": self.provenance,
            "summary": [row.to_dict() for row in self.rows()],
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
            "baseline": point(self.baseline),
            "points": [point(one) for one in self.points],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        def point(one: Mapping[str, Any]) -> Point:
            results = tuple(Result.from_dict(r, r["prompt"], r["repeat"]) for r in one["results"])
            return Point(**{**one, "results": results})

        return cls(
            baseline=point(values["baseline"]),
            points=tuple(point(one) for one in values["points"]),
            failures=tuple(Failure(**failure) for failure in values["failures"]),
            prompts=tuple(values["prompts"]),
            steps=values["steps"],
            repeats=values["repeats"],
            seed=values["seed"],
            notes=tuple(values["notes"]),
            provenance=dict(values["provenance"]),
        )

    def save(self, path: str | Path) -> Path:
        """Write all figures as JSON, whole or not at all."""
        path = Path(path)
        with staged(path) as part:
            part.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", "utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """One that :meth:`save` wrote; without its videos."""
        return cls.from_dict(json.loads(Path(path).read_text("utf-8")))

    def report(self, path: str | Path, *, fps: float = 8.0) -> Path:
        """Write the page: one HTML file that needs nothing else. ``fps`` is the speed at which videos play."""
        from .report import write

        return write(self, Path(path), fps=fps)

    def __str__(self) -> str:
        heads = (
            f"{'loop':>6} {'whole':>6} {'computed':>8} {'PSNR':>6} {'worst':>6} {'SSIM':>6} {'LPIPS':>6} {'motion':>6}"
        )
        lines = [f"{'method':<38} {heads}"]
        for row in self.rows():
            psnr, ssim, lpips, motion = (row.quality.get(name) for name in ("psnr", "ssim", "lpips", "motion_ratio"))
            fraction = "" if row.computed_fraction is None else f"{row.computed_fraction:.0%}"
            lines.append(
                f"{row.name:<38.38} {row.loop_speedup.value:>5.2f}x {row.total_speedup.value:>5.2f}x {fraction:>8} "
                + (f"{psnr.value:>6.1f} {psnr.worst:>6.1f} " if psnr is not None else f"{'':>14}")
                + (f"{ssim.value:>6.3f} " if ssim is not None else f"{'':>7}")
                + (f"{lpips.value:>6.3f} " if lpips is not None else f"{'–':>6} ")
                + (f"{motion.value:>6.3f}" if motion is not None else "")
            )
        lines += [f"{failure.method} {failure.label}: {failure.error}" for failure in self.failures]
        return "\n".join([*lines, *self.notes])
