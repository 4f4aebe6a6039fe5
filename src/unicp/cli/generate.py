"""``unicp generate``: videos from prompts, made faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import options
from .screen import messages, results

if TYPE_CHECKING:
    from ..policies import Config
    from .outputs import Target
    from .pipelines import Model
    from .running import Made

METHODS = ", ".join(options.method_names())
WARM_UP_STEPS = 2


def generate(
    prompts: list[str] = typer.Argument(None, metavar="PROMPT...", help="What to show; one video for each prompt."),
    prompts_file: Path = typer.Option(None, metavar="FILE", help="More prompts, one a line."),
    model: str = typer.Option("demo", metavar="demo|PATH|HUB_ID", help="The pipeline."),
    method: str = typer.Option("adacache", metavar="NAME|PROFILE", help=f"{METHODS}, or a profile's path."),
    settings: list[str] = typer.Option(
        None, "--set", metavar="NAME=VALUE", help="Set a field of the method's config; repeat for more."
    ),
    steps: int = typer.Option(None, min=1, help="Denoising steps."),
    seed: int = typer.Option(0, min=0, max=2**63 - 1, help="Of the noise; the same for every prompt."),
    guidance: float = typer.Option(None, min=0, help="Guidance scale."),
    size: str = typer.Option(None, metavar="WIDTHxHEIGHT", help="Pixels, as in 832x480."),
    frames: int = typer.Option(None, min=1, help="Length of the video."),
    fps: float = typer.Option(None, min=0.1, max=240, help="Frames a second of the file (demo 8, others 16)."),
    negative: str = typer.Option(None, help="What not to show."),
    compare: bool = typer.Option(
        False, "--compare", help="Also make the unaccelerated video, show both side by side, and measure."
    ),
    output: str = typer.Option(
        None, "-o", "--output", metavar="FILE|FOLDER", help=".mp4, .gif or .png (frames side by side), or a folder."
    ),
    kind: str = typer.Option(None, "--format", metavar="mp4|gif|png", help="Where no file name says it; mp4."),
    scale: int = typer.Option(
        None, min=1, max=16, help="Enlarge pixels so often. Small mp4 and gif get to 288 pixels and more."
    ),
    device: str = typer.Option(None, help="cuda, mps or cpu; the first there is."),
    dtype: str = typer.Option(None, help="float32, bfloat16, float16; bfloat16 on a GPU."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Makes videos from prompts, faster, with a .json beside each that says how to make it again.

    A file that is named with -o is replaced if it exists. Names made up from prompts replace nothing.
    Without --size, --steps and so on, the model's own defaults count.

    [bold]Examples[/bold]

    unicp generate "a red ball bouncing fast over a gray striped background"

    unicp generate "a blue star spinning slowly" --compare -o star.mp4

    unicp generate --prompts-file prompts.txt --method schedule --set interval=2 -o videos/

    unicp generate "a cat on a surfboard" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 832x480
    """
    texts = options.read_prompts(prompts or [], prompts_file)
    config = options.read_method(method, settings or [])
    if compare and config is None:
        raise options.UnicpError("--compare sets a method against none; name a --method other than none")
    given = {
        "--steps": steps,
        "--guidance": guidance,
        "--size": options.read_size(size) if size is not None else None,
        "--frames": frames,
        "--negative": negative,
    }
    from . import calls, outputs, pipelines

    targets = outputs.plan(texts, output, kind, compare)
    place, number = options.read_device(device, dtype)
    found = pipelines.find(model)
    call, rate = calls.build(found, given, fps)
    pipelines.check_method(found, config)
    pipe = pipelines.load(found, place, number)
    calls.check_shape(pipe, call)
    if found.is_demo:
        pipelines.warn_of_unknown_words(pipe, [*texts, negative or ""])
    job = Job(found, pipe, call, seed, method, config, rate, scale, place, number)
    job.run(texts, targets, compare)


@dataclass
class Job:
    """Everything that the videos of one command share."""

    model: Model
    pipe: Any
    call: dict[str, Any]
    seed: int
    method: str
    config: Config | None
    fps: float
    scale: int | None
    device: Any
    dtype: Any

    @property
    def label(self) -> str:
        """What tables and videos call the accelerated one."""
        return self.config.method if self.config is not None else "unaccelerated"

    def run(self, prompts: Sequence[str], targets: Sequence[Target], compare: bool) -> None:
        """Make and write one video after another; those that are complete stay, whatever happens to later ones."""
        from . import comparing

        screen = results()
        measured, fractions = [], []
        if compare:
            steps = {"num_inference_steps": WARM_UP_STEPS}
            self._make({**self.call, "prompt": prompts[0], **steps}, None, "warm-up")
        for index, (prompt, target) in enumerate(zip(prompts, targets, strict=True), 1):
            count = f"{index}/{len(prompts)} " if len(prompts) > 1 else ""
            if count:
                screen.print(f"{count}{prompt}", markup=False)
            call = {"prompt": prompt, **self.call}
            baseline = self._make(call, None, f"{count}unaccelerated") if compare else None
            made = self._make(call, self.config, f"{count}{self.label}")
            figures = comparing.figures(made, baseline) if baseline is not None else None
            self._write(target, call, made, baseline, figures)
            if made.report is not None:
                screen.print(str(made.report), markup=False, soft_wrap=True)
            else:
                screen.print(f"{made.steps} denoising steps in {made.loop_seconds:.1f} s")
            if baseline is not None and figures is not None and made.report is not None:
                screen.print(comparing.table(made, baseline, figures, self.label))
                measured.append(figures)
                fractions.append(made.report.computed_fraction)
            for file in target.files(compare):
                screen.print(f"wrote {file}", markup=False, soft_wrap=True)
        if len(measured) > 1:
            screen.print(comparing.summary(measured, fractions))
        if measured:
            screen.print(comparing.NOTE)

    def _make(self, call: Mapping[str, Any], config: Config | None, title: str) -> Made:
        from .running import make

        return make(self.pipe, call, seed=self.seed, config=config, title=title)

    def _write(
        self,
        target: Target,
        call: dict[str, Any],
        made: Made,
        baseline: Made | None,
        figures: dict[str, float] | None,
    ) -> None:
        """Write the files of one video: all are complete before the first gets its name."""
        from .. import video
        from . import comparing

        _, height, width, _ = made.frames.shape
        scale = self.scale or video.default_scale(height, width, target.suffix)
        with ExitStack() as files:

            def place(path: Path) -> Path:
                return files.enter_context(video.staged(path))

            def put(frames: Any, path: Path, times: int = scale) -> None:
                video.write(frames, place(path), suffix=target.suffix, fps=self.fps, scale=times)

            values = self._record(target, call, made, self.config, scale)
            put(made.frames, target.video)
            if baseline is not None and figures is not None:
                values["comparison"] = comparing.to_json(made, baseline, figures)
                put(baseline.frames, target.baseline.video)
                text = self._dumps(self._record(target.baseline, call, baseline, None, scale))
                place(target.baseline.record).write_text(text, "utf-8")
                both = [video.enlarge(video.to_uint8(run.frames), scale) for run in (baseline, made)]
                labels = comparing.labels(made, baseline, self.label)
                put(video.comparison(both[0], both[1], labels, target.suffix), target.side_by_side, 1)
            place(target.record).write_text(self._dumps(values), "utf-8")

    @staticmethod
    def _dumps(values: dict[str, Any]) -> str:
        from .records import dumps

        return dumps(values)

    def _record(
        self, target: Target, call: dict[str, Any], made: Made, config: Config | None, scale: int
    ) -> dict[str, Any]:
        from .records import record

        count, height, width, _ = made.frames.shape
        about = {"file": target.video.name, "frames": count, "width": width, "height": height}
        return record(
            model=self.model,
            pipe=self.pipe,
            call=call,
            seed=self.seed,
            method=self.method if config is not None else options.NONE,
            config=config,
            made=made,
            video={**about, "fps": self.fps, "scale": scale},
            device=self.device,
            dtype=self.dtype,
        )
