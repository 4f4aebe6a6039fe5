"""Step 5: does the demo model draw what captions say? Held-out captions, judged from pixels by unicp.demo.check.

    python -m training.evaluate --count 128                # writes training/evaluation.json
    python -m training.evaluate --count 128 --reference    # drawn videos through the VAE: the most one can hope for

A video is right in a criterion when all its objects are. Speed is asked of videos in which something is to move.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from training import models
from training.export import MODEL
from unicp import demo
from unicp.demo import scenes
from unicp.demo.check import CaptionCheck, check
from unicp.demo.scenes import Scene

CRITERIA = ("colour", "count", "direction", "speed")
PACKAGES = ("unicp", "torch", "diffusers", "transformers", "numpy", "scipy")
Figures = dict[str, dict[str, list[int]]]
"""Group of videos or objects -> criterion -> [right, asked]."""


def generate(
    pipe: Any, captions: list[str], seeds: list[int], *, steps: int, guidance: float, tick: Callable[[], None]
) -> Any:
    """Videos (B, F, H, W, 3) in [0, 1]. The noise of each comes from its own seed, whatever the batch."""

    def on_step_end(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        tick()
        return kwargs

    return pipe(
        captions,
        height=models.HEIGHT,
        width=models.WIDTH,
        num_frames=models.FRAMES,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        callback_on_step_end=on_step_end,
        output_type="np",
    ).frames


@torch.inference_mode()
def through_vae(vae: Any, drawn: list[Scene]) -> Any:
    """The scenes as they are drawn, encoded and decoded: (B, F, H, W, 3) in [0, 1]."""
    size = {"frames": models.FRAMES, "height": models.HEIGHT, "width": models.WIDTH}
    pixels = torch.from_numpy(np.stack([scenes.render(scene, **size) for scene in drawn]))
    pixels = pixels.permute(0, 4, 1, 2, 3).to(vae.device) * 2 - 1  # (B, 3, F, H, W)
    rebuilt = vae.decode(vae.encode(pixels).latent_dist.mean, return_dict=False)[0]
    return (rebuilt / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).cpu().numpy()


def tally(checks: list[CaptionCheck]) -> Figures:
    """Count what is right: of videos (all, with one, with two objects), then of objects by the motion they should have.

    >>> tally([])["all videos"]["colour"]
    [0, 0]
    """
    groups = ["all videos", "one object", "two objects", "still", *scenes.DIRECTIONS]
    groups += ["bouncing", "spinning", "growing", "shrinking"]
    figures: Figures = {group: {criterion: [0, 0] for criterion in CRITERIA} for group in groups}

    def add(group: str, criterion: str, right: bool) -> None:
        figures[group][criterion][0] += right
        figures[group][criterion][1] += 1

    for result in checks:
        moving = [thing for thing in result.things if thing.expected.motion != "still"]
        for group in ("all videos", "one object" if len(result.things) == 1 else "two objects"):
            for criterion in CRITERIA:
                if criterion != "speed" or moving:
                    add(group, criterion, getattr(result, criterion))
        for thing in result.things:
            add(thing.expected.motion, "colour", thing.colour == thing.expected.colour)
            add(thing.expected.motion, "direction", thing.direction_right)
            if thing.expected.motion != "still":
                add(thing.expected.motion, "speed", thing.speed_right)
    return figures


def table(figures: Figures, title: str) -> Table:
    shown = Table("", *CRITERIA, title=title)
    for group, criteria in figures.items():
        if any(asked for _, asked in criteria.values()):
            cells = [f"{right}/{asked} {right / asked:4.0%}" if asked else "-" for right, asked in criteria.values()]
            shown.add_row(group, *cells, end_section=group == "two objects")
    return shown


def wrong(captions: list[str], seeds: list[int], checks: list[CaptionCheck]) -> Iterator[dict[str, Any]]:
    """What went wrong in which video, for a reader who wants to look."""
    for caption, seed, result in zip(captions, seeds, checks, strict=True):
        if failed := [criterion for criterion in CRITERIA if not getattr(result, criterion)]:
            seen = [f"{t.colour} {t.seen.kind} {t.seen.speed or ''}".strip() if t.seen else None for t in result.things]
            yield {"caption": caption, "seed": seed, "wrong": failed, "objects": result.objects, "seen": seen}


def sheet(rows: list[Any], captions: list[str], checks: list[CaptionCheck], path: Path) -> None:
    """A row of every fourth frame for each video, its caption above, and what is wrong with it in red."""
    line = 14
    strips = [np.concatenate(video[::4], axis=1) for video in rows]
    height, width = strips[0].shape[:2]
    width = max(width, 7 * max(map(len, captions)))
    image = Image.new("RGB", (width, len(strips) * (height + line)), "white")
    draw = ImageDraw.Draw(image)
    for index, (strip, caption, result) in enumerate(zip(strips, captions, checks, strict=True)):
        top = index * (height + line)
        failed = [criterion for criterion in CRITERIA if not getattr(result, criterion)]
        text = caption + (f"   [wrong: {', '.join(failed)}]" if failed else "")
        draw.text((2, top + 1), text, fill="red" if failed else "black")
        image.paste(Image.fromarray((strip * 255).round().astype(np.uint8)), (0, top + line))
    image.save(path)


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return {"processor": name, "cores": os.cpu_count(), "system": platform.system()}


def fingerprint(model: Path) -> str:
    """Which weights were judged: the start of the SHA-256 of the folder's weight files."""
    digest = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def command() -> str:
    """How this was started, without the folders of the machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", "training.evaluate", *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--steps", type=int, default=demo.STEPS)
    parser.add_argument("--guidance", type=float, default=demo.GUIDANCE)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--device")
    parser.add_argument("--reference", action="store_true", help="judge drawn videos passed through the VAE instead")
    parser.add_argument("--sheet", type=Path, help="PNG with a row of frames for each video")
    parser.add_argument("-o", "--output", type=Path, help="JSON; by default training/evaluation[-reference].json")
    args = parser.parse_args()
    if not (args.model / "model_index.json").exists():
        parser.error(f"there is no model in {args.model}: python -m training.export writes one")
    name = "evaluation-reference.json" if args.reference else "evaluation.json"
    output = args.output or Path(__file__).parent / name

    device = models.pick_device(args.device)
    pipe = WanPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    drawn = scenes.held_out_scenes(args.count, args.seed)
    captions = [scene.caption() for scene in drawn]
    seeds = [args.seed * 1_000_003 + index for index in range(args.count)]
    checks: list[CaptionCheck] = []
    kept: list[Any] = []
    began = time.perf_counter()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        videos_done = progress.add_task("videos", total=args.count)
        steps_done = progress.add_task("steps of this batch", total=args.steps, visible=not args.reference)
        for first in range(0, args.count, args.batch):
            rows = slice(first, first + args.batch)
            progress.reset(steps_done)
            if args.reference:
                videos = through_vae(pipe.vae, drawn[rows])
            else:
                videos = generate(
                    pipe, captions[rows], seeds[rows], steps=args.steps, guidance=args.guidance,
                    tick=lambda: progress.advance(steps_done),
                )  # fmt: skip
            checks += [check(video, caption) for video, caption in zip(videos, captions[rows], strict=True)]
            kept += list(videos) if args.sheet else []
            progress.update(videos_done, completed=len(checks))
    seconds = time.perf_counter() - began

    figures = tally(checks)
    what = "drawn videos through the VAE" if args.reference else f"{args.steps} steps, guidance {args.guidance:g}"
    Console().print(table(figures, f"{args.count} held-out captions, {what}"))
    settings = {"count": args.count, "seed": args.seed, "batch": args.batch, "reference": args.reference}
    if not args.reference:
        settings |= {"steps": args.steps, "guidance": args.guidance}
    report = {
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "settings": settings,
        "weights": fingerprint(args.model),
        "size": {"frames": models.FRAMES, "height": models.HEIGHT, "width": models.WIDTH},
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "machine": machine() | {"device": device.type, "seconds": round(seconds, 1)},
        "right_of_asked": figures,
        "accuracy": {
            group: {name: round(right / asked, 4) for name, (right, asked) in criteria.items() if asked}
            for group, criteria in figures.items()
        },
        "wrong": list(wrong(captions, seeds, checks)),
    }
    part = output.with_name(output.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    part.rename(output)
    if args.sheet:
        sheet(kept, captions, checks, args.sheet)


if __name__ == "__main__":
    main()
