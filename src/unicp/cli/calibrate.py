"""``unicp calibrate``: measure a pipeline, once, for UniCP."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import UnicpError
from . import options

PROMPTS_HELP = "What to run it on; by default four captions for the demo model."
SET_HELP = "A field of UniCPConfig, as in delta=0.15; may be repeated."


def calibrate(
    prompts: list[str] | None = typer.Argument(None, metavar="PROMPT...", help=PROMPTS_HELP),
    prompts_file: Path | None = typer.Option(None, metavar="FILE", help="More prompts, one a line."),
    model: str = typer.Option("demo", metavar="MODEL", help="demo, the folder of a pipeline, or a hub id."),
    settings: list[str] = typer.Option(None, "--set", metavar="NAME=VALUE", help=SET_HELP),
    steps: int = typer.Option(None, min=1, metavar="N", help="Denoising steps."),
    seed: int = typer.Option(
        0, min=0, max=2**32 - 1, metavar="N", help="Of the first prompt's noise; then 1 more each."
    ),
    guidance: float = typer.Option(None, min=0, metavar="X", help="Guidance scale."),
    size: str = typer.Option(None, metavar="WxH", help="Width and height in pixels, as in 832x480."),
    frames: int = typer.Option(None, min=1, metavar="N", help="Length of the video."),
    negative: str = typer.Option(None, metavar="TEXT", help="What not to show."),
    tokens: int = typer.Option(2048, min=1, metavar="N", help="Most rows of an output that are compared."),
    host: bool = typer.Option(False, "--host", help="Keep outputs to compare in the host's memory."),
    output: Path = typer.Option(..., "-o", "--output", metavar="FILE", help="The profile, a .safetensors file."),
    device: str = typer.Option(None, metavar="NAME", help="cuda, mps or cpu; by default the first there is."),
    dtype: str = typer.Option(None, metavar="NAME", help="As for unicp generate."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Measures an unaccelerated pipeline and writes a profile for --method unicp.

    What is done is kept in FILE.part.safetensors after every run: after Ctrl-C the same command goes on from there.

    [bold]Examples[/bold]

    unicp calibrate -o demo.safetensors

    unicp generate "a red ball bouncing fast over a gray striped background" --method demo.safetensors

    unicp calibrate --prompts-file prompts.txt --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers -o wan.safetensors
    """
    if output.suffix != ".safetensors":
        raise UnicpError(f"-o {output} must end in .safetensors")
    if not output.absolute().parent.is_dir():
        raise UnicpError(f"cannot write {output}: there is no folder {output.parent}")
    config = options.read_method("unicp", settings or [])
    texts = list(prompts or [])
    if not texts and prompts_file is None:
        if model != "demo":
            raise UnicpError("give a few prompts of the kind the model will be used for, or --prompts-file")
        from ..demo import scenes

        # Captions of the kind it was trained on: those that were held out are for judging what comes of it.
        texts = [scenes.sample_scene(30_000_000 + i).caption() for i in range(4)]
    texts = options.read_prompts(texts, prompts_file)
    given = {
        "--steps": steps,
        "--guidance": guidance,
        "--size": options.read_size(size) if size is not None else None,
        "--frames": frames,
        "--negative": negative,
    }
    from . import calls, pipelines
    from .screen import results

    place, number = options.read_device(device, dtype)
    found = pipelines.find(model)
    call, _ = calls.build(found, given, None)
    pipe = pipelines.load(found, place, number)
    calls.check_shape(pipe, call)
    from ..calibration import calibrate as run
    from ..policies.unicp import UniCPConfig

    assert isinstance(config, UniCPConfig)
    part = output.with_suffix(".part.safetensors")
    profile = run(pipe, texts, config=config, tokens=tokens, host=host, seed=seed, checkpoint=part, **call)
    profile.save(output)
    screen = results()
    screen.print(f"wrote {output}; use it with: unicp generate PROMPT --method {output}", markup=False, soft_wrap=True)
    screen.print(f"look at it with: unicp inspect {output}", markup=False, soft_wrap=True)
