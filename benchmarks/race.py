"""The moving picture of the README: one caption, three ways, with clocks; and the picture of all methods' curves.

    python -m benchmarks.race            # after make bench-compare

Which caption, which peer and what the clocks say is read from the committed comparison (:func:`runners`): the best
peer is the one of highest mean PSNR at twice the speed, the caption the one on which we are ahead of it by the median.
Clocks are the medians of that comparison; the videos are made anew, and are not timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import unicp
from benchmarks import common, figures
from unicp.bench import peers
from unicp.bench.harness import generate
from unicp.bench.isolation import fresh
from unicp.files import video
from unicp.tensors import metrics

OURS, SPEED = "budget", 2.0
MOVING = common.RESULTS.parent.parent / "docs" / "images" / "race.gif"
CURVES = MOVING.with_name("curves.svg")
SCALE, GAP, HEAD, FOOT = 2, 8, 26, 24
GAIN = 8
"""Of the difference below the videos."""
COLOURS = 192
PAPER, TEXT, QUIET, TRACK, RUNNING, OVER = INKS = "#15171a", "#ffffff", "#9aa1a9", "#2a2e33", "#f0b64f", "#7fd18b"
OWN_COLOURS = {"budget": "#b4411f", "adacache-forecast": "#d9822b", "adacache": "#b8860b"}
RATE = 8
"""Frames a second, of the videos and of the clocks."""


@dataclass(frozen=True)
class Runner:
    """One of the three: seconds of the denoising loop, and PSNR (dB) of its video, ``None`` of the first one's."""

    method: str
    label: str
    seconds: float
    psnr: float | None


@dataclass(frozen=True)
class Race:
    number: int
    caption: str
    runners: tuple[Runner, Runner, Runner]


def runners(comparison: unicp.Comparison) -> Race:
    """Who runs, on which caption, and what the clocks say."""
    quality = comparison.at_speedup(SPEED)
    curves = comparison.curves()
    others = [name for name in curves if not curves[name][0].ours and name not in ("control", "fewer-steps")]
    best = max((name for name in others if quality[name] is not None), key=lambda name: quality[name] or 0.0)
    found = []
    for name in (OURS, best):
        row = min(curves[name], key=lambda row: abs(row.loop_speedup.value - SPEED))
        point = next(p for p in comparison.points if (p.method, p.label) == (name, row.label))
        found.append((row, [point.measured("psnr")[i] for i in range(len(comparison.prompts))], point))
    gaps = [a - b for a, b in zip(found[0][1], found[1][1], strict=True)]
    number = sorted(range(len(gaps)), key=lambda i: gaps[i])[len(gaps) // 2]
    base = median(comparison.beside(result)["loop_seconds"] for result in found[0][2].results)
    racing = [Runner("unaccelerated", "", base, None)]
    racing += [Runner(r.method, r.label, base / r.loop_speedup.value, psnr[number]) for r, psnr, _ in found]
    return Race(number, comparison.prompts[number] or "", tuple(racing))  # type: ignore[arg-type]


def make(race: Race) -> list[Any]:
    """The three videos (F, H, W, 3)."""
    pipe, made = common.pipeline(), []
    call = {"prompt": race.caption, **common.CALL}
    for runner in race.runners:
        if runner.method == "unaccelerated":
            made.append(generate(fresh(pipe), call, seed=0).frames)
            continue
        peer = peers.known()[runner.method]()
        peer.labels(unicp.demo.STEPS)
        run = peers.Run(fresh(pipe), call)
        made.append(generate(run.pipe, peer.apply(run, runner.label), seed=0).frames)
        peer.remove(run)
        print(f"{runner.method} {runner.label}: {metrics.psnr(made[-1], made[0]):.1f} dB, committed {runner.psnr:.1f}")
    return made


def draw(race: Race, videos: list[Any], path: Path) -> None:
    """The videos, each shown from when its clock has stopped, above their difference from the first."""
    from PIL import Image, ImageDraw, ImageFont

    side = unicp.demo.WIDTH * SCALE
    width, height = 3 * side + 2 * GAP, HEAD + side + GAP + side // 2 + FOOT
    large, small = ImageFont.load_default(15), ImageFont.load_default(12)
    shown = [video.enlarge(video.to_uint8(frames), SCALE) for frames in videos]
    apart = [
        video.to_uint8(np.clip(GAIN * np.abs(frames - videos[0]), 0, 1)).repeat(SCALE // 2, 1).repeat(SCALE // 2, 2)
        for frames in videos
    ]
    longest = max(runner.seconds for runner in race.runners)
    count = round(longest * RATE) + 2 * len(videos[0])
    pages = []
    for number in range(count):
        page = Image.new("RGB", (width, height), PAPER)
        pen = ImageDraw.Draw(page)
        for place, runner in enumerate(race.runners):
            left, now = place * (side + GAP), number / RATE
            over = now >= runner.seconds
            clock = f"{min(now, runner.seconds):.1f} s"
            name = f"{runner.method} (best peer)" if place == 2 else runner.method
            pen.text((left + 4, HEAD / 2), name, font=large, fill=TEXT, anchor="lm")
            pen.text((left + side - 4, HEAD / 2), clock, font=large, fill=OVER if over else RUNNING, anchor="rm")
            if over:
                frame = number % len(videos[0])  # the same in all of them
                page.paste(Image.fromarray(shown[place][frame]), (left, HEAD))
                if place:
                    page.paste(Image.fromarray(apart[place][frame]), (left, HEAD + side + GAP))
                    said = f"{runner.psnr:.1f} dB"
                    pen.text((left + side - 4, HEAD + side + GAP + side // 4), said, font=large, fill=TEXT, anchor="rm")
                    pen.text(
                        (left + side - 4, HEAD + side + GAP + side // 4 + 16),
                        f"difference x{GAIN}",
                        font=small,
                        fill=QUIET,
                        anchor="rm",
                    )
            else:
                share = now / runner.seconds
                middle = HEAD + side // 2
                pen.rectangle((left + 20, middle - 4, left + side - 20, middle + 4), fill=TRACK)
                pen.rectangle((left + 20, middle - 4, left + 20 + (side - 40) * share, middle + 4), fill=RUNNING)
                pen.text((left + side / 2, middle + 18), "denoising", font=small, fill=QUIET, anchor="mm")
        pen.text((4, height - FOOT / 2), race.caption, font=small, fill=QUIET, anchor="lm")
        pages.append(np.asarray(page))
    ended = len(pages) - len(videos[0])
    save(pages[ended:] + pages[:ended], path)  # what does not play it shows the end


def save(pages: list[Any], path: Path) -> None:
    """A gif of few colours and without dithering, which a small picture of flat colours does not need."""
    from PIL import Image, ImageColor

    inks = [np.full((40, pages[0].shape[1], 3), ImageColor.getrgb(ink), np.uint8) for ink in INKS]
    sample = Image.fromarray(np.concatenate([*pages[:: max(1, len(pages) // 8)], *inks]))
    palette = sample.quantize(COLOURS, dither=Image.Dither.NONE)
    first, *rest = [Image.fromarray(page).quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    first.save(path, save_all=True, append_images=rest, duration=1000 // RATE, loop=0, optimize=True)


def curves(comparison: unicp.Comparison, path: Path) -> None:
    """Quality against speed, every method: mean PSNR over the captions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "unicp", "svg.fonttype": "path", "font.size": 9}
    figure, axes = pyplot.subplots(figsize=(7.6, 4.1), layout="constrained", facecolor="white")
    ends = []
    for name, rows in comparison.curves().items():
        known = [(row.loop_speedup.value, row.quality["psnr"].value) for row in rows if row.quality["psnr"] is not None]
        known = [(x, y) for x, y in known if 1.2 <= x <= 4.2 and y < 90]
        if name == "control" or not known:
            continue
        ours, plain = rows[0].ours, name == "fewer-steps"
        colour = OWN_COLOURS.get(name, "#b4411f") if ours else "#444444" if plain else None
        style = {"linewidth": 2.4 if ours else 1.3, "linestyle": "--" if plain else "-", "marker": "o"}
        (line,) = axes.plot(*zip(*known, strict=True), markersize=3.5, color=colour, **style)
        ends.append((known[-1], name, line.get_color(), ours))
    lines: list[tuple[float, float]] = []  # where labels stand
    for (x, y), name, colour, ours in sorted(ends, key=lambda end: end[0][1]):
        height = next(
            y + by
            for by in (0, -1.7, 1.7, -3.4, 3.4, -5.1, 5.1)
            if all(abs(x - other) > 0.62 or abs(y + by - taken) > 1.6 for other, taken in lines)
        )
        lines.append((x, height))
        weight = "bold" if ours else "normal"
        style = {"fontsize": 7.5, "color": colour, "fontweight": weight, "zorder": 5}
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        axes.annotate(name, (x + 0.03, height), va="center", bbox=behind, **style)
    axes.set_xlim(1.2, 4.7)
    axes.set_xlabel("speed-up of the denoising loop, wall clock")
    axes.set_ylabel("PSNR against the unaccelerated video (dB)")
    axes.grid(alpha=0.25)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    comparison = figures.read_comparison(common.RESULTS / "compare-50.json")
    curves(comparison, CURVES)
    race = runners(comparison)
    print(race)
    draw(race, make(race), MOVING)
    print(f"written: {MOVING.name} ({MOVING.stat().st_size / 2**10:.0f} KiB), {CURVES.name}")


if __name__ == "__main__":
    main()
