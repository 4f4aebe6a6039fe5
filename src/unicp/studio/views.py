"""The HTML that a page shows for a job and its result; everything that a user wrote is escaped."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Iterable
from html import escape
from typing import Any

from ..bench import sprites
from ..engine.report import readable_bytes
from .job import CANCELLED, DONE, FAILED, FAST, PLAIN, WAITING, WARMING, Job, Result
from .request import changed, takes_speed
from .timeline import timeline

DOING = {
    PLAIN: "Making the unaccelerated video",
    FAST: "Making the accelerated video",
    WARMING: "Warming up: two steps that count for neither video",
}
"""States in which steps are counted."""


def status(job: Job | None, ahead: int = 0) -> str:
    """One line on what is going on, a bar, and the decisions of the accelerated video so far."""
    if job is None:
        return ""
    if job.state == FAILED:
        return failure(job.error)
    if job.state == CANCELLED:
        return '<div class="unicp-status" role="status">Cancelled. The next video starts clean.</div>'
    if job.state == DONE:
        return ""
    if job.stopping:
        text, share = "Stopping after the step that is running", None
    elif job.state == WAITING:
        videos = "video is" if ahead == 1 else "videos are"
        text, share = f"Waiting: {ahead} {videos} being made before this one" if ahead else "Waiting", None
    elif job.state in DOING:
        text, share = DOING[job.state], job.steps / job.total if job.total else None
        if job.total and job.steps == job.total:
            text += ": decoding"
        elif job.total:
            left = (job.total - job.steps) * (time.monotonic() - job.began) / max(job.steps, 1)
            text += f": step {job.steps} of {job.total}, {left:.0f} s left"
    else:
        text, share = "Loading the model", None
    bar = f'<progress max="1" {"" if share is None else f"value={share:.3f}"} aria-label="progress"></progress>'
    picture = timeline(job.records, job.total) if job.state == FAST and job.records else ""
    return f'<div class="unicp-status" role="status"><span>{escape(text)}</span>{bar}{picture}</div>'


def failure(text: str) -> str:
    """An error, in sentences."""
    text = text[:1].upper() + text[1:]
    return (
        f'<div class="unicp-error" role="alert">{escape(text if text.endswith((".", "!", "?")) else text + ".")}</div>'
    )


def player(result: Result) -> str:
    """Both videos as sheets of frames, as JSON for player.js."""

    def uri(frames: Any) -> str:
        return "data:image/webp;base64," + base64.b64encode(sprites.sheet(frames)).decode("ascii")

    layout = sprites.layout(*result.made.frames.shape[:3])
    made, plain = result.made, result.plain
    return json.dumps(
        {
            "layout": layout.to_dict(),
            "fps": result.prepared.fps / layout.stride,
            "left": uri(plain.frames),
            "right": uri(made.frames),
            "captions": {
                "left": ["unaccelerated", f"{plain.loop_seconds:.1f} s"],
                "right": [result.request.config.method, f"{made.loop_seconds:.1f} s, {result.speedup:.2f}× as fast"],
            },
        }
    )


def decibels(value: float) -> str:
    """
    >>> decibels(41.44), decibels(math.inf)
    ('41.4 dB', 'identical')
    """
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def figures(result: Result) -> str:
    """Cards for speed, closeness, time and memory, and then the notes."""
    made, plain, report = result.made, result.plain, result.made.report
    assert report is not None
    loop = f"denoising loop {plain.loop_seconds:.2f} → {made.loop_seconds:.2f} s"
    whole = f"with decoding {plain.total_seconds:.2f} → {made.total_seconds:.2f} s"
    again = "; the unaccelerated video is an earlier run's" if result.kept else ""
    cards = [
        ("speed-up", f"{result.speedup:.2f}×", f"{loop}, {whole}{again}"),
        ("PSNR", decibels(result.psnr), "against the unaccelerated video; higher is nearer"),
        ("SSIM", f"{result.ssim:.4f}", "structural similarity; 1 is identical"),
        ("motion", f"{result.motion_ratio:.3f}", "motion energy over the unaccelerated video's; 1 is preserved"),
        (
            "computed",
            f"{report.computed_steps} of {report.count} steps",
            f"{report.computed_fraction:.0%} of the denoiser's arithmetic",
        ),
        ("memory", readable_bytes(report.cache_bytes), _memory(result)),
    ]
    boxes = "".join(
        f'<div class="card"><h4>{name}</h4><b>{escape(value)}</b><p>{escape(about)}</p></div>'
        for name, value, about in cards
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    return f'<div class="unicp-cards">{boxes}</div>' + (f'<ul class="unicp-notes">{notes}</ul>' if notes else "")


def _memory(result: Result) -> str:
    kept = "kept for later steps, at most"
    if result.made.peak_bytes is None or result.plain.peak_bytes is None:
        return kept
    peaks = " → ".join(readable_bytes(run.peak_bytes or 0) for run in (result.plain, result.made))
    return f"{kept}; in the loop beyond the weights {peaks}"


def decisions(result: Result) -> str:
    """The timeline of the accelerated video."""
    report = result.made.report
    assert report is not None
    return timeline(report.steps, result.made.steps)


def line(number: int, result: Result) -> str:
    """A result in one line, for the list of runs."""
    prompt = result.request.prompt
    short = prompt if len(prompt) <= 48 else prompt[:47] + "…"
    said = [
        summary(result.request.config),
        f"{result.speedup:.2f}×",
        decibels(result.psnr),
        f"seed {result.request.seed}",
    ]
    return f"{number}. {' · '.join([*said, short])}"


def summary(config: Any) -> str:
    """A method and its fields that are not at their defaults, shortened.

    >>> from unicp.policies.budget import BudgetConfig
    >>> summary(BudgetConfig(target_speedup=3.0))
    'budget 3×'
    """
    if takes_speed(config):
        return f"{config.method} {config.target_speedup:g}×"
    return " ".join([config.method, _short(f"{name}={value}" for name, value in changed(config).items())]).strip()


def _short(words: Iterable[str], longest: int = 60) -> str:
    text = ", ".join(words)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def hint(config: Any) -> str:
    """What the place of the speed slider means for a method."""
    if takes_speed(config):
        text = f"Asks for {config.target_speedup:g}× the speed of the denoising loop."
    elif getattr(config, "min_psnr", None) is not None:
        text = f"Asks for {config.min_psnr:g} dB; the slider has no say."
    else:
        said = _short((f"{name}={value}" for name, value in changed(config).items()), 120)
        text = f"From mild to bold: {said or 'all at its defaults'}. How fast that is, the run shows."
    return f'<p class="unicp-hint">{escape(text)}</p>'
