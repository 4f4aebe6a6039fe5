"""``unicp calibrate`` measures a pipeline, once, for UniCP."""

from __future__ import annotations

from pathlib import Path

import typer

from . import measuring, options

SET_HELP = "A field of UniCPConfig, as in delta=0.15; may be repeated."


def calibrate(
    prompts: list[str] = typer.Argument(None, metavar="PROMPT...", help=measuring.PROMPTS_HELP),
    prompts_file: Path = typer.Option(None, metavar="FILE", help="A file of more prompts, one per line."),
    model: str = typer.Option("demo", metavar="MODEL", help="demo, the folder of a pipeline, or a hub id."),
    settings: list[str] = typer.Option(None, "--set", metavar="NAME=VALUE", help=SET_HELP),
    steps: int = typer.Option(None, min=1, metavar="N", help="Denoising steps."),
    seed: int = typer.Option(0, min=0, max=2**32 - 1, metavar="N", help=measuring.SEED_HELP),
    guidance: float = typer.Option(None, min=0, metavar="X", help="Guidance scale."),
    size: str = typer.Option(None, metavar="WxH", help="Width and height in pixels, as in 832x480."),
    frames: int = typer.Option(None, min=1, metavar="N", help="Length of the video."),
    negative: str = typer.Option(None, metavar="TEXT", help="Negative prompt: what not to show."),
    tokens: int = typer.Option(2048, min=1, metavar="N", help="Most rows of an output that are compared."),
    host: bool = typer.Option(False, "--host", help="Keep outputs to compare in the host's memory."),
    output: Path = typer.Option(..., "-o", "--output", metavar="FILE", help="The profile, a .safetensors file."),
    device: str = typer.Option(
        None, metavar="NAME", help="cuda, mps or cpu; by default the first of these that there is."
    ),
    dtype: str = typer.Option(None, metavar="NAME", help="As for unicp generate."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Measures an unaccelerated pipeline and writes a profile for --method unicp.

    After every run the results are saved in FILE.part.safetensors: after Ctrl-C the same command resumes from there.

    [bold]Examples[/bold]

    unicp calibrate -o demo.safetensors

    unicp generate "a red ball bouncing fast over a gray striped background" --method demo.safetensors

    unicp calibrate --prompts-file prompts.txt --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers -o wan.safetensors
    """
    part = measuring.check_output(output)
    config = options.read_method("unicp", settings or [])
    texts = measuring.read_prompts(prompts, prompts_file, model, 4)
    given = options.of_call(steps=steps, guidance=guidance, size=size, frames=frames, negative=negative)
    pipe, call = measuring.load(model, given, device, dtype)
    from ..offline.calibrate import calibrate as run
    from ..policies.unicp import UniCPConfig

    assert isinstance(config, UniCPConfig)
    with options.resumable(part):
        found = run(pipe, texts, config=config, tokens=tokens, host=host, seed=seed, checkpoint=part, **call)
    measuring.write(found, output)
