"""``unicp studio`` serves a page on which a video is made both accelerated and unaccelerated."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import options

if TYPE_CHECKING:
    from ..studio.request import Backend, Prepared, Request

HOST_HELP = "127.0.0.1 serves this machine alone; 0.0.0.0 lets others in."
PORT_HELP = "By default 7860, or the next free one."
SHARE_HELP = "Ask Gradio's servers for a public link, for as long as this runs."
MODEL_HELP = "Model that the page begins with: demo, the folder of a pipeline, or a hub id."


def studio(
    model: str = typer.Option("demo", metavar="MODEL", help=MODEL_HELP),
    host: str = typer.Option("127.0.0.1", metavar="ADDRESS", help=HOST_HELP),
    port: int = typer.Option(None, min=1, max=65535, metavar="N", help=PORT_HELP),
    share: bool = typer.Option(False, "--share", help=SHARE_HELP),
    browser: bool = typer.Option(True, "--browser/--no-browser", help="Open the page."),
    device: str = typer.Option(
        None, metavar="NAME", help="cuda, mps or cpu; by default the first of these that there is."
    ),
    dtype: str = typer.Option(None, metavar="NAME", help="As for unicp generate."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Serves a page: a prompt, a method and a speed, both videos in step, every decision, and what it cost.

    Needs the extra studio, which brings Gradio. The page is for this machine alone, and sends nothing anywhere.

    [bold]Examples[/bold]

    unicp studio

    unicp studio --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --port 8000 --no-browser
    """
    from ..studio import server

    server.check()
    from ..studio.page import build
    from ..studio.workshop import Workshop

    models = list(dict.fromkeys([model, "demo", *members(Path("zoo"))]))
    page = server.launch(
        build(Workshop(backend(device, dtype)), models),
        host=host,
        port=port,
        share=share,
        inbrowser=browser,
    )
    from .screen import results

    screen = results()
    screen.print(f"the page is at {page.local_url}; Ctrl-C ends it", markup=False, soft_wrap=True)
    if page.share_url:
        screen.print(f"and, for everybody who knows it, at {page.share_url}", markup=False, soft_wrap=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def members(folder: Path) -> list[str]:
    """The pipelines in a folder, such as those of the proving ground."""
    return [str(index.parent) for index in sorted(folder.glob("*/model_index.json"))]


def backend(device: str | None, dtype: str | None) -> Backend:
    """The functions of this command line that the page needs: to read settings, and to find and load models."""
    from ..studio.request import Backend, Prepared
    from . import calls, checks, pipelines

    place, number = options.read_device(device, dtype)
    loaded: dict[str, Any] = {}

    def prepare(request: Request) -> Prepared:
        found = pipelines.find(request.model)
        given = dict(request.options)
        if given.get("--size") is not None:
            given["--size"] = options.read_size(given["--size"])
        call, fps = calls.build(found, given, None)
        checks.check_method(found, request.config)
        if found.source not in loaded:
            loaded.clear()  # one model at a time, as two may not fit into memory
            loaded[found.source] = pipelines.load(found, place, number)
        pipe = loaded[found.source]
        calls.check_shape(pipe, call)
        if found.is_demo:
            pipelines.warn_of_unknown_words(pipe, [request.prompt, given.get("--negative") or ""])
        return Prepared(pipe=pipe, call=call, source=found.source, device=str(place), dtype=number, fps=fps)

    def settings(lines: Sequence[str]) -> dict[str, Any]:
        return options.read_settings(lines)

    return Backend(settings=settings, prepare=prepare)
