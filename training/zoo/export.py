"""Write a trained member into ``zoo``, judge its videos from their pixels, and write its card.

    python -m training.zoo.export cogvideox                      # averaged weights, in bfloat16
    python -m training.zoo.export cogvideox --to some/folder --count 8   # a look at a run that is not finished

Captions are held out: none of them was trained on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from training.evaluate import CRITERIA, machine, sheet, tally
from training.zoo.data import RUNS
from training.zoo.member import Member
from training.zoo.members import NAMES, member
from unicp.demo.check import CaptionCheck, check
from unicp.demo.scenes import Scene, held_out_scenes
from zoo import FOLDER, parts

SHEET_ROWS = 8

USAGE = """
pipe, call = zoo.load("{name}")
video = pipe(prompt="a red ball bouncing fast over a gray striped background", **call, output_type="np").frames[0]"""

USAGE_WITH_INPUTS = """from unicp.demo import scenes

pipe, call = zoo.load("{name}")
scene = scenes.sample_scene(1)
call |= zoo.inputs("{name}", scene)
video = pipe(prompt=scene.caption(), **call, output_type="np").frames[0]"""

CARD = """# {name}

{about}.

```python
import zoo
{usage}
```

## What it is

{components}

It makes {frames} frames of {height} x {width} pixels, with the text encoder and the VAE of the demo model. The weights
are stored in bfloat16, {size:.1f} MB.

## How it was trained

{videos:,} videos drawn by `unicp.demo.scenes`, encoded by the demo's VAE; {steps:,} steps of {batch} videos, learning
rate {lr:g} (falling to zero over the last {decay:,} steps), caption dropout {dropout:g}, exponential average {ema:g};
{hours:.1f} hours on one core of a shared machine.

```sh
{command}
```

| step | loss |
|---|---|
{curve}

## How good it is

{count} held-out captions, {inference} steps; what is right of what was asked, from pixels:

| | {criteria} |
|---|{rule}
{scores}

{seconds:.0f} seconds on {processor}. The first {rows} of them, what is wrong with a video in red:

![a row of frames for each caption](sheet.png)
"""


def averaged(chosen: Member, state: dict[str, Any]) -> dict[str, Any]:
    """The components with the exponential average of their weights, rounded to bfloat16."""
    modules = chosen.modules()
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                parameter.copy_(state["average"][name][key].to(torch.bfloat16))
    return modules


def write(modules: dict[str, Any], folder: Path) -> None:
    """One folder a component: its weights in bfloat16 and its configuration."""
    for name, module in modules.items():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        part = folder / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        module.save_pretrained(part)
        for path in part.iterdir():
            path.chmod(0o644)
        shutil.rmtree(folder / name, ignore_errors=True)
        part.rename(folder / name)


def generate(chosen: Member, pipe: Any, drawn: list[Scene], seeds: list[int]) -> list[Any]:
    """Videos (F, H, W, 3) in [0, 1]. The noise of each comes from its own seed, whatever the batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    fixed = {**chosen.call(), "output_type": "np"}
    if not chosen.inputs(drawn[0]):
        return list(pipe(prompt=[scene.caption() for scene in drawn], generator=generators, **fixed).frames)
    # What a scene has of its own cannot be given for many at once.
    return [
        pipe(prompt=scene.caption(), generator=generator, **chosen.inputs(scene), **fixed).frames[0]
        for scene, generator in zip(drawn, generators, strict=True)
    ]


def table(checks: list[CaptionCheck]) -> str:
    rows = []
    for group in ("all videos", "one object", "two objects"):
        counts = (tally(checks)[group][criterion] for criterion in CRITERIA)
        cells = [f"{right}/{asked} {right / asked:.0%}" if asked else "-" for right, asked in counts]
        rows.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(rows)


def described(modules: dict[str, Any]) -> str:
    lines = []
    for name, module in modules.items():
        count = sum(p.numel() for p in module.parameters()) / 1e6
        lines.append(f"- `{name}`: `{type(module).__name__}`, {count:.2f} M parameters (`{name}/config.json`)")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("member", choices=NAMES)
    parser.add_argument("--to", type=Path, help="by default the member's folder in zoo")
    parser.add_argument("--count", type=int, default=48, help="captions to judge it by")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    chosen = member(args.member)
    folder = args.to or FOLDER / chosen.name
    folder.mkdir(parents=True, exist_ok=True)
    state = torch.load(RUNS / f"{chosen.name}.pt")
    write(averaged(chosen, state), folder)
    modules = chosen.load(folder)
    pipe, call = chosen.pipeline(modules), chosen.call()

    drawn = held_out_scenes(args.count, args.seed)
    captions = [scene.caption() for scene in drawn]
    seeds = [args.seed * 1_000_003 + index for index in range(args.count)]
    checks: list[CaptionCheck] = []
    kept: list[Any] = []
    began = time.perf_counter()
    for first in range(0, args.count, args.batch):
        rows = slice(first, first + args.batch)
        videos = generate(chosen, pipe, drawn[rows], seeds[rows])
        checks += [check(video, caption) for video, caption in zip(videos, captions[rows], strict=True)]
        kept += list(videos)
        print(f"{len(checks)} of {args.count} captions", flush=True)
    path = folder / "sheet.png"
    sheet(kept[:SHEET_ROWS], captions[:SHEET_ROWS], checks[:SHEET_ROWS], path)
    Image.open(path).quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
    seconds = time.perf_counter() - began

    settings, curve = state["settings"], state["curve"]
    every = max(1, len(curve) // 12)
    command = ["python", "-m", "training.zoo", chosen.name, "--steps", str(state["step"])]
    text = CARD.format(
        name=chosen.name,
        about=chosen.about,
        usage=(USAGE_WITH_INPUTS if chosen.inputs(drawn[0]) else USAGE).format(name=chosen.name),
        components=described(modules),
        frames=parts.FRAMES,
        height=call["height"],
        width=call["width"],
        size=sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6,
        videos=settings["videos"],
        steps=state["step"],
        batch=settings["batch"],
        lr=settings["lr"],
        decay=settings["decay"],
        dropout=settings["caption_dropout"],
        ema=settings["ema"],
        hours=state["seconds"] / 3600,
        command=shlex.join([*command, "--decay", str(settings["decay"]), "--batch", str(settings["batch"])]),
        curve="\n".join(f"| {step:,} | {loss:.4f} |" for step, loss in curve[::-1][::every][::-1]),
        count=args.count,
        inference=call["num_inference_steps"],
        criteria=" | ".join(CRITERIA),
        rule="---|" * len(CRITERIA),
        scores=table(checks),
        seconds=seconds,
        processor=machine()["processor"],
        rows=min(SHEET_ROWS, args.count),
    )
    (folder / "card.md").write_text(text, "utf-8")
    figures = {"seed": args.seed, "count": args.count, "right_of_asked": tally(checks)}
    (folder / "scores.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    print(table(checks))


if __name__ == "__main__":
    main()
