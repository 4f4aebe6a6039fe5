"""``unicp batch``: thousands of clips, on the devices of this machine or on a Ray cluster."""

from __future__ import annotations

from pathlib import Path

import typer

from ..batch.prompts import FORMATS
from ..errors import UnicpError, unknown
from . import options

ENGINES = ("local", "ray")
NAMES = ("hash", "vbench")
PROMPTS_HELP = f"A file of prompts ({', '.join(FORMATS)}); or status DIR, to see the state of a batch."
SEEDS_HELP = "Clips of each prompt: seeds from --seed (or the row's own) upwards."
NAMES_HELP = "hash: prompt, seed and a hash of all options; vbench: {prompt}-{index}.mp4."
ENGINE_HELP = "local: one process per device of this machine; ray: a Ray cluster (extra: ray)."
WORKERS_HELP = "By default one per GPU, or one on a CPU."
RANKS_HELP = "Devices that make each clip together, by context parallelism."
BATCH_HELP = "Most clips of equal size and options that are made in one forward."
RESUME_HELP = "Keep the clips that are done; --no-resume makes them again."
RETRIES_HELP = "How often a clip is tried again after its worker died."
ADDRESS_HELP = "A Ray cluster, as auto or ray://HOST:10001; without it, Ray is started here."
GPUS_HELP = "For ray; fractions share a GPU. By default 1 where the cluster has any."
THREADS_HELP = "CPU threads of a worker; by default its share of the cores."
DEVICE_HELP = "cuda (all GPUs), cuda:1, mps or cpu; by default the first of these that there is."


def batch(
    arguments: list[str] = typer.Argument(..., metavar="PROMPTS", help=PROMPTS_HELP),
    output: Path = typer.Option(None, "-o", "--output", metavar="DIR", help="Folder of the clips."),
    model: str = typer.Option("demo", metavar="MODEL", help="demo, the folder of a pipeline, or a hub id."),
    method: str = typer.Option("budget", metavar="METHOD", help=options.METHOD_HELP),
    settings: list[str] = typer.Option(None, "--set", metavar="NAME=VALUE", help=options.SET_HELP),
    seeds: int = typer.Option(1, min=1, metavar="N", help=SEEDS_HELP),
    seed: int = typer.Option(0, min=0, max=2**32 - 1, metavar="N", help="Seed of the first clip of each prompt."),
    names: str = typer.Option("hash", metavar="NAME", help=NAMES_HELP),
    steps: int = typer.Option(None, min=1, metavar="N", help="Denoising steps."),
    guidance: float = typer.Option(None, min=0, metavar="X", help="Guidance scale."),
    size: str = typer.Option(None, metavar="WxH", help="Width and height in pixels, as in 832x480."),
    frames: int = typer.Option(None, min=1, metavar="N", help="Length of the video."),
    fps: float = typer.Option(None, min=0.1, max=240, metavar="X", help=f"Frames a second; {options.FPS_HELP}"),
    negative: str = typer.Option(None, metavar="TEXT", help="Negative prompt: what not to show."),
    kind: str = typer.Option("mp4", "--format", metavar="NAME", help="mp4, gif or png."),
    scale: int = typer.Option(None, min=1, max=16, metavar="N", help=options.SCALE_HELP),
    engine: str = typer.Option("local", metavar="NAME", help=ENGINE_HELP),
    workers: int = typer.Option(None, min=1, metavar="N", help=WORKERS_HELP),
    ranks: int = typer.Option(1, "--devices-per-clip", min=1, metavar="N", help=RANKS_HELP),
    batch_size: int = typer.Option(1, min=1, metavar="N", help=BATCH_HELP),
    resume: bool = typer.Option(True, "--resume/--no-resume", help=RESUME_HELP),
    retries: int = typer.Option(2, min=0, metavar="N", help=RETRIES_HELP),
    device: str = typer.Option(None, metavar="NAME", help=DEVICE_HELP),
    dtype: str = typer.Option(None, metavar="NAME", help=options.DTYPE_HELP),
    threads: int = typer.Option(None, min=1, metavar="N", help=THREADS_HELP),
    address: str = typer.Option(None, metavar="ADDRESS", help=ADDRESS_HELP),
    gpus: float = typer.Option(None, "--gpus-per-worker", min=0, metavar="X", help=GPUS_HELP),
    cpus: float = typer.Option(None, "--cpus-per-worker", min=0, metavar="X", help="For ray; by default 1."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Makes a clip for every prompt in a file, on all devices. The same command again makes what is left.

    Columns of .csv, .jsonl and .parquet: prompt, and any of negative_prompt,
    seed, steps, guidance, size, frames, method and image. What a row leaves out
    is taken from the options. A clip that fails stops no other; the exit code is
    1 if any did. A killed batch loses at most the clips in progress.

    [bold]Examples[/bold]

    unicp batch prompts.txt -o videos/

    unicp batch vbench.csv -o videos/ --seeds 5 --names vbench --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers

    unicp batch prompts.csv -o videos/ --devices-per-clip 2 --model Wan-AI/Wan2.2-T2V-A14B-Diffusers

    unicp batch prompts.jsonl -o videos/ --engine ray --address auto --workers 8 --method schedule --set interval=2

    unicp batch status videos/
    """
    if arguments[0] == "status":
        from .batch_status import status

        return status(arguments[1:], output)
    if len(arguments) > 1:
        raise UnicpError(f"unicp batch takes one file of prompts, got {len(arguments)}: {' '.join(arguments)}")
    if output is None:
        raise UnicpError("name the folder of the clips, as in: unicp batch prompts.txt -o videos/")
    for what, value, known in (("engine", engine, ENGINES), ("--names", names, NAMES)):
        if value not in known:
            raise unknown(what, value, known)
    of_ray = {"--address": address, "--gpus-per-worker": gpus, "--cpus-per-worker": cpus}
    for option, told in of_ray.items():
        if engine == "local" and told is not None:
            raise UnicpError(f"{option} is for --engine ray; add it, or leave {option} out")
    if ranks > 1 and batch_size > 1:
        raise UnicpError(
            f"--batch-size {batch_size} puts several clips on one device, --devices-per-clip {ranks} one clip on "
            "several; use one of both"
        )
    if ranks > 1 and engine == "ray" and device not in (None, "cpu", "cuda"):
        raise UnicpError(f"--device {device} is one device, --devices-per-clip asks for {ranks}; leave one out")
    given = options.of_call(steps=steps, guidance=guidance, size=size, frames=frames, negative=negative)
    from . import checks
    from .batching import Place, Plan, execute
    from .clips import anywhere
    from .making import PipelineRecipe

    plan = Plan.read(
        Path(arguments[0]), model=model, method=method, settings=settings or [], given=given, fps=fps, kind=kind
    )
    for config in plan.configs.values():
        checks.check_method(plan.model, config)
    clips = plan.clips(seed=seed, seeds=seeds, names=names, dtype=dtype, scale=scale)
    place = Place(
        engine=engine,
        workers=workers,
        ranks=ranks,
        device=device,
        threads=threads,
        address=address,
        gpus=gpus,
        cpus=cpus,
    )
    if ranks > 1:
        checks.check_spread(plan.model, list(plan.configs.values()), ranks)
    code = execute(
        plan,
        clips,
        output,
        place,
        lambda threads: PipelineRecipe(model=anywhere(plan.model), dtype=dtype, scale=scale, threads=threads),
        dtype=dtype,
        batch_size=batch_size,
        retries=retries,
        resume=resume,
    )
    if code:
        raise typer.Exit(code)
