"""The page, its fields and what its buttons do. Importing this module needs Gradio."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from .. import demo
from ..errors import UnicpError
from ..policies.config import Config
from . import views
from .job import DONE, Job, Result
from .request import DEFAULT_METHOD, MAX_SPEEDUP, MIN_SPEEDUP, Request, configure, methods, read_number
from .workshop import Workshop

HERE = Path(__file__).parent
POLL = 0.15
"""Seconds between two updates of a job in progress."""
KEPT_RUNS = 20
"""Runs that a page keeps; the oldest goes first."""
COPY = """(text) => {{
  navigator.clipboard.writeText(text);
  const button = document.querySelector("#{id}"), said = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => {{ button.textContent = said; }}, 1500);
}}"""
EMPTY = '<div class="unicp-empty">Both videos, their difference and every decision will be here.</div>'


@dataclass
class Page:
    """The state of one open page on the server: its job in progress and its runs."""

    job: Job | None = None
    runs: list[tuple[int, Result]] = field(default_factory=list)
    count: int = 0

    def keep(self, result: Result) -> int:
        self.count += 1
        self.runs = [*self.runs, (self.count, result)][-KEPT_RUNS:]
        return self.count


class Pages:
    """The open pages, by Gradio's name for a session."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self._pages: dict[str, Page] = {}

    def of(self, request: gr.Request) -> Page:
        return self._pages.setdefault(str(request.session_hash), Page())

    def close(self, request: gr.Request) -> None:
        """Cancel the job of a page that is gone."""
        page = self._pages.pop(str(request.session_hash), None)
        if page is not None and page.job is not None:
            page.job.cancel()


def read_config(
    workshop: Workshop, method: str | None, speed: float, steps: str | None, settings: str | None
) -> Config:
    """The config that the method, the slider and the settings ask for."""
    lines = [line.strip() for line in (settings or "").splitlines() if line.strip()]
    count = read_number("steps", steps, low=1) or demo.STEPS
    return configure((method or "").strip(), speed, count, workshop.backend.settings(lines))


def read_request(workshop: Workshop, values: Mapping[str, Any]) -> Request:
    """The request that the fields of the page describe.

    Raises:
        UnicpError: one of them holds what cannot be.
    """
    return Request(
        prompt=(values["prompt"] or "").strip(),
        model=(values["model"] or "").strip(),
        config=read_config(workshop, values["method"], values["speed"], values["steps"], values["settings"]),
        seed=read_number("the seed", values["seed"], low=0) or 0,
        options={
            "--steps": read_number("steps", values["steps"], low=1),
            "--guidance": read_number("guidance", values["guidance"], low=0, whole=False),
            "--size": (values["size"] or "").strip() or None,
            "--frames": read_number("frames", values["frames"], low=1),
            "--negative": (values["negative"] or "").strip() or None,
        },
    )


def build(workshop: Workshop, models: list[str]) -> gr.Blocks:
    """The page.

    Args:
        models: models that its field offers; any other may be typed.
    """
    pages = Pages(workshop)
    with gr.Blocks(title="unicp studio", analytics_enabled=False) as blocks:
        gr.HTML(
            '<div class="unicp-head"><b>unicp <i>studio</i></b><span>A video made both ways: '
            "what it costs, and what it changes.</span></div>"
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                fields = _fields(models)
                with gr.Row():
                    make = gr.Button("Make both videos", variant="primary", elem_id="make")
                    cancel = gr.Button("Cancel", elem_id="cancel", interactive=False)
            with gr.Column(scale=2, min_width=320):
                status = gr.HTML(elem_id="status")
                player = gr.HTML(
                    value="",
                    html_template=(HERE / "player.html").read_text("utf-8"),
                    css_template=(HERE / "player.css").read_text("utf-8"),
                    js_on_load=(HERE / "player.js").read_text("utf-8"),
                    elem_id="player",
                )
                figures = gr.HTML(EMPTY, elem_id="figures")
                decisions = gr.HTML(elem_id="decisions")
                runs = gr.Radio([], label="Runs of this page", visible=False, elem_id="runs", elem_classes="unicp-runs")
                with gr.Accordion("The same without this page", open=False, visible=False, elem_id="code") as code:
                    python = gr.Code(language="python", label="Python", elem_id="python", interactive=False)
                    copy_python = gr.Button("Copy as Python", elem_id="copy-python", size="sm")
                    command = gr.Code(language="shell", label="Command", elem_id="command", interactive=False)
                    copy_command = gr.Button("Copy as command", elem_id="copy-command", size="sm")

        shown = [status, player, figures, decisions, code, python, command]
        hint = fields.pop("hint")
        names, inputs = list(fields), list(fields.values())

        def show(result: Result) -> dict[Any, Any]:
            return {
                status: "",
                player: views.player(result),
                figures: views.figures(result),
                decisions: views.decisions(result),
                code: gr.update(visible=True),
                python: result.prepared.python(result.request),
                command: result.request.command(),
            }

        def listed(page: Page, number: int) -> dict[str, Any]:
            choices = [(views.line(each, result), each) for each, result in reversed(page.runs)]
            return gr.update(choices=choices, value=number, visible=True)

        def on_make(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
            page = pages.of(request)
            idle = {make: gr.update(interactive=True), cancel: gr.update(interactive=False)}
            if page.job is not None and not page.job.over:
                return  # pressed twice
            try:
                job = page.job = workshop.submit(read_request(workshop, dict(zip(names, values, strict=True))))
            except UnicpError as error:
                yield {status: views.failure(str(error)), **idle}
                return
            busy = {make: gr.update(interactive=False), cancel: gr.update(interactive=True)}
            said = ""
            while not job.over:
                text = views.status(job, workshop.ahead(job))
                if text != said:
                    yield {status: text, **busy}
                    said, busy = text, {}
                time.sleep(POLL)
            if job.state == DONE and job.result is not None:
                number = page.keep(job.result)
                yield {**show(job.result), runs: listed(page, number), **idle}
            else:
                yield {status: views.status(job), **idle}

        def on_cancel(request: gr.Request) -> dict[str, Any]:
            job = pages.of(request).job
            if job is not None:
                job.cancel()
            return gr.update(interactive=False)

        def on_pick(number: int | None, request: gr.Request) -> dict[Any, Any]:
            return next((show(result) for each, result in pages.of(request).runs if each == number), {})

        def on_change(method: str, speed: float, steps: str, settings: str) -> str:
            try:
                return views.hint(read_config(workshop, method, speed, steps, settings))
            except UnicpError as error:
                return views.failure(str(error))

        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on(
            [make.click, fields["prompt"].submit],
            on_make,
            inputs,
            [*shown, runs, make, cancel],
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        cancel.click(on_cancel, None, cancel, **quick)
        runs.input(on_pick, runs, shown, **quick)
        asked = [fields[name] for name in ("method", "speed", "steps", "settings")]
        gr.on([each.change for each in asked] + [blocks.load], on_change, asked, hint, **quick)
        for button, text in ((copy_python, python), (copy_command, command)):
            button.click(None, text, None, js=COPY.format(id=button.elem_id), api_visibility="private")
        blocks.unload(pages.close)
    return blocks


def _fields(models: list[str]) -> dict[str, Any]:
    """The fields of the request, by name; ``hint`` says which setting the slider means."""
    fields: dict[str, Any] = {
        "prompt": gr.Textbox(demo.prompts(1)[0], label="Prompt", lines=2, max_lines=6, elem_id="prompt"),
        "model": gr.Dropdown(
            models,
            value=models[0],
            label="Model",
            info="demo, the folder of a pipeline, or a hub id",
            allow_custom_value=True,
            elem_id="model",
        ),
        "method": gr.Dropdown(
            methods(),
            value=DEFAULT_METHOD,
            label="Method",
            info="or the path of a profile",
            allow_custom_value=True,
            elem_id="method",
        ),
        "speed": gr.Slider(MIN_SPEEDUP, MAX_SPEEDUP, value=2.0, step=0.25, label="Speed", elem_id="speed"),
        "hint": gr.HTML(elem_id="hint"),
        "seed": gr.Textbox("0", label="Seed", max_lines=1, elem_id="seed"),
    }
    with gr.Accordion("Steps, size and more", open=False, elem_id="more"):
        gr.HTML('<p class="unicp-hint">What is left empty is the model\'s own.</p>')
        with gr.Row():
            fields["steps"] = gr.Textbox("", label="Steps", max_lines=1, elem_id="steps", min_width=120)
            fields["guidance"] = gr.Textbox("", label="Guidance", max_lines=1, elem_id="guidance", min_width=120)
        with gr.Row():
            fields["size"] = gr.Textbox("", label="Size", placeholder="832x480", elem_id="size", min_width=120)
            fields["frames"] = gr.Textbox("", label="Frames", max_lines=1, elem_id="frames", min_width=120)
        fields["negative"] = gr.Textbox("", label="What not to show", elem_id="negative")
        fields["settings"] = gr.Textbox(
            "", label="Fields of the config", info="one a line, as in moreg=true", lines=2, elem_id="settings"
        )
    return fields
