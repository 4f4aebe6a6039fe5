"""``unicp generate`` makes videos from prompts, faster."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import UnicpError
from . import options

COMPARE_HELP = "Also make the unaccelerated video, show both side by side, and measure."
OUTPUT_HELP = "A file (.mp4, .gif, or .png: frames side by side) or a folder; by default here, named after the prompt."
NEXT = (
    "Next: --set target_speedup=3 is faster, 1.5 is nearer; a model of your own:\n"
    "--model FOLDER or a hub id; both videos in step, on a page: unicp studio"
)


def generate(
    prompts: list[str] = typer.Argument(
        None, metavar="PROMPT...", help="What to show; one video is made for each prompt."
    ),
    prompts_file: Path = typer.Option(None, metavar="FILE", help="A file of more prompts, one per line."),
    model: str = typer.Option("demo", metavar="MODEL", help="demo, the folder of a pipeline, or a hub id."),
    method: str = typer.Option("budget", metavar="METHOD", help=options.METHOD_HELP),
    settings: list[str] = typer.Option(None, "--set", metavar="NAME=VALUE", help=options.SET_HELP),
    steps: int = typer.Option(None, min=1, metavar="N", help="Denoising steps."),
    seed: int = typer.Option(0, min=0, max=2**32 - 1, metavar="N", help="Seed of the noise, the same for all prompts."),
    guidance: float = typer.Option(None, min=0, metavar="X", help="Guidance scale."),
    size: str = typer.Option(None, metavar="WxH", help="Width and height in pixels, as in 832x480."),
    frames: int = typer.Option(None, min=1, metavar="N", help="Length of the video."),
    fps: float = typer.Option(None, min=0.1, max=240, metavar="X", help=f"Frames a second; {options.FPS_HELP}"),
    negative: str = typer.Option(None, metavar="TEXT", help="Negative prompt: what not to show."),
    compare: bool = typer.Option(False, "--compare", help=COMPARE_HELP),
    output: str = typer.Option(None, "-o", "--output", metavar="PATH", help=OUTPUT_HELP),
    kind: str = typer.Option(None, "--format", metavar="NAME", help="mp4, gif or png, if -o does not say which."),
    scale: int = typer.Option(None, min=1, max=16, metavar="N", help=options.SCALE_HELP),
    device: str = typer.Option(
        None, metavar="NAME", help="cuda, mps or cpu; by default the first of these that there is."
    ),
    dtype: str = typer.Option(None, metavar="NAME", help=options.DTYPE_HELP),
    offload: str = typer.Option(None, metavar="HOW", help=options.OFFLOAD_HELP),
    compiled: bool = typer.Option(False, "--compile", help=options.COMPILE_HELP),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Makes videos from prompts, faster, with a .json beside each that says how to make it again.

    Without --method, half of the work is saved: a budget with target_speedup=2.
    A file that you name with -o is replaced if it exists. Files that are named after prompts replace nothing.
    Without --size, --steps and so on, the model's own defaults apply.

    [bold]Examples[/bold]

    unicp generate "a red ball bouncing fast over a gray striped background"

    unicp generate "a blue star spinning slowly" --compare -o star.mp4

    unicp generate --prompts-file prompts.txt --method schedule --set interval=2 -o videos/

    unicp generate "a cat on a surfboard" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480
    """
    texts = options.read_prompts(prompts or [], prompts_file)
    config = options.read_method(method, settings or [])
    options.check_offload(offload)
    if compare and config is None:
        raise UnicpError("--compare sets a method against none; name a --method other than none")
    given = options.of_call(steps=steps, guidance=guidance, size=size, frames=frames, negative=negative)
    # The imports below load torch and diffusers, which takes seconds that a wrong option should not cost.
    from . import calls, checks, jobs, outputs, pipelines
    from .screen import results

    targets = outputs.plan(texts, output, kind, compare)
    place, number = options.read_device(device, dtype)
    found = pipelines.find(model)
    call, rate = calls.build(found, given, fps)
    checks.check_method(found, config)
    pipe = pipelines.load(found, place, number, offload, compiled)
    calls.check_shape(pipe, call)
    if found.is_demo:
        pipelines.warn_of_unknown_words(pipe, [*texts, negative or ""])
    job = jobs.Job(
        model=found,
        pipe=pipe,
        call=call,
        seed=seed,
        method=method,
        config=config,
        fps=rate,
        scale=scale,
        device=place,
        dtype=number,
        offload=offload,
        compiled=compiled,
    )
    job.run(texts, targets, compare)
    if found.is_demo and compare:
        results().print(NEXT, markup=False)
