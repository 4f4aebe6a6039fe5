"""``unicp compare`` measures every method over its main knob against the unaccelerated pipeline."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import UnicpError
from . import options

METHODS_HELP = (
    "Names with commas between, or paths of profiles; by default all. A peer's knob can be given its own values: "
    "first-block-cache=0.05:0.1. See unicp compare --list."
)
RESULTS_HELP = "File that keeps every run, so that an interrupted comparison resumes; by default beside the report."
REPEATS_HELP = "How often each video is made; more make the timing of few prompts steadier."
OFFLOAD_HELP = "Keep one model at a time on the device (diffusers' model offload), where all do not fit."
DEMO_PROMPTS_HELP = "Captions the demo model was not trained on, instead of PROMPT."


def compare(
    prompts: list[str] = typer.Argument(
        None, metavar="PROMPT...", help="What to show; every method makes a video for each prompt."
    ),
    prompts_file: Path = typer.Option(None, metavar="FILE", help="A file of more prompts, one per line."),
    demo_prompts: int = typer.Option(None, min=1, metavar="N", help=DEMO_PROMPTS_HELP),
    model: str = typer.Option("demo", metavar="MODEL", help="demo, the folder of a pipeline, or a hub id."),
    methods: str = typer.Option(None, metavar="NAME,...", help=METHODS_HELP),
    report: Path = typer.Option("report.html", metavar="FILE", help="The page to write; the figures go beside it."),
    results: Path = typer.Option(None, metavar="FILE", help=RESULTS_HELP),
    steps: int = typer.Option(None, min=1, metavar="N", help="Denoising steps."),
    seed: int = typer.Option(0, min=0, max=2**32 - 1, metavar="N", help="Seed of the noise, the same for all videos."),
    repeats: int = typer.Option(1, min=1, metavar="N", help=REPEATS_HELP),
    guidance: float = typer.Option(None, min=0, metavar="X", help="Guidance scale."),
    size: str = typer.Option(None, metavar="WxH", help="Width and height in pixels, as in 832x480."),
    frames: int = typer.Option(None, min=1, metavar="N", help="Length of the video."),
    negative: str = typer.Option(None, metavar="TEXT", help="Negative prompt: what not to show."),
    device: str = typer.Option(
        None, metavar="NAME", help="cuda, mps or cpu; by default the first of these that there is."
    ),
    dtype: str = typer.Option(None, metavar="NAME", help=f"{', '.join(options.DTYPES)}."),
    offload: str = typer.Option(None, metavar="model", help=OFFLOAD_HELP),
    list_: bool = typer.Option(False, "--list", help="Show what can be compared, and stop."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Compares methods on your model and prompts: wall-clock, operations, memory, quality. Writes a page about it.

    Our methods, plain fewer steps, the caches of diffusers and of cache-dit, each over its main knob and on a fresh
    pipeline, in turns. One that does not apply is listed with its own error. Interrupt it whenever you like: the
    same command goes on where it stopped.

    [bold]Examples[/bold]

    unicp compare --demo-prompts 2 --methods adacache,fewer-steps --report report.html

    unicp compare "a red ball bouncing fast over a gray striped background" --steps 20

    unicp compare --prompts-file prompts.txt --methods adacache,first-block-cache=0.05:0.1:0.2,fewer-steps

    unicp compare "a cat on a surfboard" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --methods unicp,wan.safetensors
    """
    from .screen import Runs, results as screen  # noqa: I001

    if list_:
        from ..bench.peers import resolve

        for peer in resolve(None):
            lines = (peer.__class__.__doc__ or "").strip().splitlines() if not peer.ours else ["unicp"]
            screen().print(f"{peer.name:<22} {lines[0]}", markup=False, soft_wrap=True)
        return
    if offload not in (None, "model"):
        raise UnicpError(f"--offload {offload}: compare can offload whole models only: --offload model")
    if report.suffix.lower() not in (".html", ".htm"):
        raise UnicpError(f"--report {report} is no page; give a name that ends in .html")
    from ..files.whole import check_writable

    kept = results or report.with_suffix(".sqlite")
    for file in (report, report.with_suffix(".json"), kept):
        check_writable(file)
    texts = list(prompts or [])
    if demo_prompts is not None:
        from .. import demo

        texts += demo.prompts(demo_prompts)
    texts = options.read_prompts(texts, prompts_file)
    # The imports below load torch and diffusers, which takes seconds that a wrong option should not cost.
    from ..bench.compare import compare as measure
    from ..bench.peers import resolve
    from . import calls, pipelines

    peers = resolve(None if methods is None else [name.strip() for name in methods.split(",") if name.strip()])
    place, number = options.read_device(device, dtype)
    found = pipelines.find(model)
    given = options.of_call(steps=steps, guidance=guidance, size=size, frames=frames, negative=negative)
    call, fps = calls.build(found, given, None)
    pipe = pipelines.load(found, place, number, offload)
    calls.check_shape(pipe, call)
    with options.resumable(kept), Runs() as shown:
        comparison = measure(pipe, peers, texts, seed=seed, repeats=repeats, results=kept, progress=shown.show, **call)
    comparison.report(report, fps=fps)
    comparison.save(report.with_suffix(".json"))
    screen().print(str(comparison), markup=False, soft_wrap=True)
    screen().print(f"wrote {report}, {report.with_suffix('.json').name} and {kept.name}", markup=False, soft_wrap=True)
