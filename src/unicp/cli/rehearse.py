"""``unicp rehearse``: what methods will cost at full size, with nothing computed and no accelerator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from ..errors import UnicpError
from . import options
from .screen import messages, results, waiting

METHODS = ", ".join(name for name in options.method_names() if name != options.NONE)
MODEL_HELP = (
    "wan-1.3b, wan-14b, wan2.2-a14b, hunyuan-video, hunyuan-video-1.5, ltx, ltx-2, cogvideox-5b, mochi or open-sora; "
    "or a folder with the configuration of a diffusers pipeline or transformer of such a kind; weights are not needed."
)
GPU_HELP = "Accelerator of the projected speed: h100, h200, a100, 4090, or PEAK_TFLOPS,GB_A_SECOND."
MEMORY_HELP = "Memory of the accelerator in 10^9 bytes: also try UniCP with what weights and activations leave of it."
CHANGE_HELP = "How much each step is assumed to change what methods measure; in a real run the content decides."


def rehearse(
    model: str = typer.Option(..., metavar="MODEL", help=MODEL_HELP),
    method: str | None = typer.Option(None, metavar="METHOD", help=f"{METHODS}, or a profile; by default all."),
    settings: list[str] | None = typer.Option(
        None, "--set", metavar="NAME=VALUE", help="A field of the method's config."
    ),
    size: str = typer.Option(None, metavar="WxH", help="By default as the authors of the model use it."),
    frames: int = typer.Option(None, min=1, metavar="N", help="Length of the video."),
    steps: int = typer.Option(None, min=2, metavar="N", help="Denoising steps."),
    gpu: str = typer.Option("h100", metavar="NAME", help=GPU_HELP),
    memory: float = typer.Option(None, min=0.1, metavar="GB", help=MEMORY_HELP),
    change: float = typer.Option(0.04, min=0, metavar="X", help=CHANGE_HELP),
    as_json: bool = typer.Option(
        False, "--json", help="Print everything as JSON, including reads by place and timelines."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Tells what a method will cost at full size, in a minute or two, without weights and without an accelerator.

    The published configuration is built without weights, and the accelerated loop runs on shapes alone: operations by
    kind of layer, bytes kept, peak, reads of the device, and a projected speed-up by the operations and the bytes.

    [bold]Examples[/bold]

    unicp rehearse --model wan-1.3b

    unicp rehearse --model wan-14b --size 1280x720 --frames 81 --steps 50 --gpu h200

    unicp rehearse --model wan-14b --method unicp --set delta_mlp=0.1 --json

    unicp rehearse --model ./my-wan --memory 24
    """
    given = list(settings or [])
    if given and not method:
        raise UnicpError(f"--set {given[0]} needs a --method whose field it is")
    if method == options.NONE:
        raise UnicpError("--method none costs what the unaccelerated run does, which is always shown; name a method")
    config = options.read_method(method, given) if method is not None else None
    asked: dict[str, Any] = {"size": options.read_size(size) if size is not None else None}
    from ..offline import local, pretend, published
    from ..offline import rehearse as rehearsal

    device = pretend.device_named(gpu)
    named = model in published.MODELS or not _is_path(model)
    found = published.published(model) if named else local.local(model)
    width, height = asked["size"] or list(found.sizes.values())[-1]
    configs = published.configs() if config is None else {method or "": config}
    with waiting(f"rehearsing {found.name}"):
        made = rehearsal.rehearse(
            found,
            configs,
            width=width,
            height=height,
            frames=frames or found.frames,
            steps=steps or found.steps,
            device=device,
            change=change,
            memory=None if memory is None else int(memory * 1e9),
        )
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
        return
    screen = results()
    screen.print(str(made), markup=False, soft_wrap=True)
    for name, each in made.methods.items():
        for note in each.notes:
            messages().print(f"{name}: {note}", markup=False, soft_wrap=True)


def _is_path(model: str) -> bool:
    return "/" in model or "\\" in model or model.startswith((".", "~")) or Path(model).exists()
