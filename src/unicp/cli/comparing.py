"""``--compare`` measures a video against its unaccelerated twin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

from ..bench.harness import Made
from ..tensors import metrics

NOTE = (
    "One run each, after a warm-up: good for an impression. Medians of interleaved\n"
    "runs over many prompts are in benchmarks/."
)


def figures(made: Made, baseline: Made) -> dict[str, float]:
    """Speed-ups by wall clock, and distances between the two videos (in dB where the name says so).

    ``motion_ratio`` is 1 where motion is preserved, below 1 where it was damped.
    """
    return {
        "loop_speedup": baseline.loop_seconds / made.loop_seconds,
        "total_speedup": baseline.total_seconds / made.total_seconds,
        "psnr_db": metrics.psnr(made.frames, baseline.frames),
        "ssim": metrics.ssim(made.frames, baseline.frames),
        "motion_ratio": metrics.motion_ratio(made.frames, baseline.frames),
    }


def _decibels(value: float) -> str:
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def table(made: Made, baseline: Made, measured: dict[str, float], method: str) -> Table:
    """A table of both runs side by side, at most 80 columns wide."""
    assert made.report is not None
    shown = Table("", "unaccelerated", method, "", title="against the unaccelerated video, same seed")
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, speedup in (("loop_seconds", "loop_speedup"), ("total_seconds", "total_speedup")):
        label = "denoising loop" if name == "loop_seconds" else "whole call, with decoding"
        seconds = [f"{getattr(run, name):.2f} s" for run in (baseline, made)]
        shown.add_row(label, *seconds, f"{measured[speedup]:.2f}x as fast")
    report = made.report
    shown.add_row("steps computed", str(baseline.steps), str(report.computed_steps), f"of {report.count}")
    shown.add_row("denoiser's operations", "100%", f"{report.computed_fraction:.0%}", "")
    shown.add_section()
    shown.add_row("PSNR", "", _decibels(measured["psnr_db"]), "higher is nearer")
    shown.add_row("SSIM", "", f"{measured['ssim']:.4f}", "1 is equal")
    shown.add_row("motion ratio", "", f"{measured['motion_ratio']:.3f}", "1 is preserved")
    return shown


def summary(all_measured: Sequence[dict[str, float]], fractions: Sequence[float]) -> str:
    """The mean over several prompts, in one line."""

    def mean(name: str) -> float:
        return fmean(measured[name] for measured in all_measured)

    return (
        f"mean of {len(all_measured)} prompts: loop {mean('loop_speedup'):.2f}x as fast, {fmean(fractions):.0%} of the "
        f"operations,\n  PSNR {_decibels(mean('psnr_db'))}, SSIM {mean('ssim'):.4f}, "
        f"motion ratio {mean('motion_ratio'):.3f}"
    )


def labels(made: Made, baseline: Made, method: str) -> tuple[str, str]:
    """The labels above the two videos; seconds are those of the denoising loop."""
    return f"unaccelerated {baseline.loop_seconds:.1f} s", f"{method} {made.loop_seconds:.1f} s"


def to_json(made: Made, baseline: Made, measured: dict[str, float]) -> dict[str, Any]:
    """Plain values for the record beside the video."""
    seconds = {"loop_seconds": baseline.loop_seconds, "total_seconds": baseline.total_seconds}
    return {"baseline": seconds, **measured, "note": "one run each, after a warm-up of two steps"}
