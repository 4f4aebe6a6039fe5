"""``unicp tune`` finds the best plans for every speed, once, for the budget."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import UnicpError
from . import measuring, options

SPEEDUP_HELP = "How much faster the denoising loop is to be; 2 if you give no target."
PSNR_HELP = "Or: how close to the unaccelerated video, in dB, for four of five prompts."
LEAP_HELP = "Share of the run in which the solver may take longer steps; 0 makes plans that servers can play."
EFFORT_HELP = "low, medium or high: how many shapes of plans are compared."


def tune(
    prompts: list[str] = typer.Argument(None, metavar="PROMPT...", help=measuring.PROMPTS_HELP),
    prompts_file: Path = typer.Option(None, metavar="FILE", help="A file of more prompts, one per line."),
    model: str = typer.Option("demo", metavar="MODEL", help="demo, the folder of a pipeline, or a hub id."),
    target_speedup: float = typer.Option(None, metavar="X", help=SPEEDUP_HELP),
    min_psnr: float = typer.Option(None, metavar="X", help=PSNR_HELP),
    effort: str = typer.Option("medium", metavar="NAME", help=EFFORT_HELP),
    leap: float = typer.Option(0.6, min=0, max=1, metavar="X", help=LEAP_HELP),
    steps: int = typer.Option(None, min=1, metavar="N", help="Denoising steps."),
    seed: int = typer.Option(0, min=0, max=2**32 - 1, metavar="N", help=measuring.SEED_HELP),
    guidance: float = typer.Option(None, min=0, metavar="X", help="Guidance scale."),
    size: str = typer.Option(None, metavar="WxH", help="Width and height in pixels, as in 832x480."),
    frames: int = typer.Option(None, min=1, metavar="N", help="Length of the video."),
    negative: str = typer.Option(None, metavar="TEXT", help="Negative prompt: what not to show."),
    output: Path = typer.Option(..., "-o", "--output", metavar="FILE", help="The profile, a .safetensors file."),
    device: str = typer.Option(
        None, metavar="NAME", help="cuda, mps or cpu; by default the first of these that there is."
    ),
    dtype: str = typer.Option(None, metavar="NAME", help="As for unicp generate."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Compares ways to choose the steps that are computed, and writes a profile with a plan for every speed.

    The results so far are saved in FILE.part.json: after Ctrl-C the same command resumes from there.

    [bold]Examples[/bold]

    unicp tune --target-speedup 2 -o demo-2x.safetensors

    unicp generate "a red ball bouncing fast over a gray striped background" --method demo-2x.safetensors

    unicp tune --prompts-file prompts.txt --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --min-psnr 32 -o wan.safetensors

    unicp tune --leap 0 -o demo-server.safetensors
    """
    part = measuring.check_output(output).with_suffix(".json")
    from ..policies.budget import BudgetConfig

    BudgetConfig(target_speedup=target_speedup, min_psnr=min_psnr)  # refused before anything is loaded
    from ..offline import candidates
    from ..offline import tune as tuning

    if effort not in candidates.EFFORTS:
        raise UnicpError(f"--effort must be one of {', '.join(candidates.EFFORTS)}, got {effort!r}")
    texts = measuring.read_prompts(prompts, prompts_file, model, 8)
    given = options.of_call(steps=steps, guidance=guidance, size=size, frames=frames, negative=negative)
    pipe, call = measuring.load(model, given, device, dtype)
    with options.resumable(part):
        found = tuning.tune(
            pipe,
            texts,
            target_speedup=target_speedup,
            min_psnr=min_psnr,
            effort=effort,
            leap=leap,
            seed=seed,
            checkpoint=part,
            **call,
        )
    measuring.write(found, output)
