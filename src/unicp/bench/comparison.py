"""The result of a comparison: results by run, points by setting, and figures over prompts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..files.whole import staged
from .quality import MEASURES
from .results import Failure, Point, Result, Row
from .statistics import Estimate, at_speed, estimate, speedups


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of :func:`unicp.compare`. ``print`` shows a table; :meth:`report` writes the page.

    Attributes:
        baseline: runs of the unaccelerated pipeline.
        points: one for each setting of each method.
        failures: settings that did not apply or broke, each with its own error.
        prompts: the prompts; ``None`` for prompt embeddings.
        steps: denoising steps of a run.
        repeats: how often every video was made.
        seed: seed of the noise.
        notes: remarks on the figures.
        provenance: machine, versions, call and command.
    """

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
        """Seconds of the unaccelerated run to which a run's speed-up refers (``loop_seconds``, ``total_seconds``)."""
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

        It is read off the line between the method's points. If the slowest point is faster than ``speedup``, that point
        counts: a method does not lose because it was not measured slower. Beyond the fastest point the figure is
        ``None``. Points whose videos are identical to the unaccelerated ones are left out, as their PSNR is infinite.

        Args:
            speedup: speed-up of the denoising loop.
            measure: name of one of the measures.
            worst: whether to take the worst prompt instead of the mean.
        """
        found: dict[str, float | None] = {}
        for name, rows in self.curves().items():
            known = [(r, e) for r in rows if not r.identical and (e := r.quality.get(measure)) is not None]
            points = [(r.loop_speedup.value, e.worst if worst else e.value) for r, e in known]
            found[name] = at_speed(points, speedup)
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
        """Read a comparison that :meth:`save` wrote; it has no videos."""
        return cls.from_dict(json.loads(Path(path).read_text("utf-8")))

    def report(self, path: str | Path, *, fps: float = 8.0) -> Path:
        """Write the page: one self-contained HTML file. Videos play at ``fps`` frames per second."""
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
