"""Makes the videos of one ``unicp generate`` one after another, writes and reports them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.harness import Made
from ..files import video, whole
from ..policies.config import Config
from . import comparing, records
from .model import Model
from .options import NONE
from .outputs import Target
from .running import make
from .screen import results, waiting

WARM_UP_STEPS = 2
"""Denoising steps of the run before a comparison, so that one-time costs of a process count for neither video."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The settings that all videos of one command share.

    Attributes:
        call: arguments of the pipeline's call, without the prompt.
        method: as the user wrote it.
        offload, compiled: as for :func:`unicp.cli.pipelines.load`.
        scale: ``None`` enlarges small videos (:func:`unicp.files.video.default_scale`).
    """

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
    offload: str | None = None
    compiled: bool = False

    @property
    def label(self) -> str:
        """Label of the accelerated video in tables and pictures."""
        return self.config.method if self.config is not None else "unaccelerated"

    def run(self, prompts: Sequence[str], targets: Sequence[Target], compare: bool) -> None:
        """Make and write one video after another; complete ones stay, whatever happens to later ones."""
        screen = results()
        measured, fractions = [], []
        if compare:
            short = {"num_inference_steps": WARM_UP_STEPS}
            for config in (None, self.config) if self.compiled else (None,):
                self._make({"prompt": prompts[0], **self.call, **short}, config, "warm-up")
        for number, (prompt, target) in enumerate(zip(prompts, targets, strict=True), 1):
            count = f"{number}/{len(prompts)} " if len(prompts) > 1 else ""
            if count:
                screen.print(f"{count}{prompt}", markup=False)
            call = {"prompt": prompt, **self.call}
            baseline = self._make(call, None, f"{count}unaccelerated") if compare else None
            made = self._make(call, self.config, f"{count}{self.label}")
            figures = comparing.figures(made, baseline) if baseline is not None else None
            with waiting(f"writing {target.video.name}"):
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
        return make(self.pipe, call, seed=self.seed, config=config, title=title)

    def _write(
        self,
        target: Target,
        call: dict[str, Any],
        made: Made,
        baseline: Made | None,
        figures: dict[str, float] | None,
    ) -> None:
        """Write the files of one video; all of them are complete before the first gets its name."""
        height, width = made.frames.shape[1:3]
        scale = self.scale or video.default_scale(height, width, target.suffix)
        with ExitStack() as files:

            def put(frames: Any, path: Path, factor: int = scale) -> None:
                part = files.enter_context(whole.staged(path))
                video.write(frames, part, suffix=target.suffix, fps=self.fps, scale=factor)

            def note(values: Mapping[str, Any], path: Path) -> None:
                files.enter_context(whole.staged(path)).write_text(records.dumps(values), "utf-8")

            values = self._record(target, call, made, self.config, scale)
            put(made.frames, target.video)
            if baseline is not None and figures is not None:
                values["comparison"] = comparing.to_json(made, baseline, figures)
                put(baseline.frames, target.baseline.video)
                note(self._record(target.baseline, call, baseline, None, scale), target.baseline.record)
                left, right = (video.enlarge(video.to_uint8(run.frames), scale) for run in (baseline, made))
                labels = comparing.labels(made, baseline, self.label)
                put(video.comparison(left, right, labels, target.suffix), target.side_by_side, 1)
            note(values, target.record)

    def _record(
        self, target: Target, call: dict[str, Any], made: Made, config: Config | None, scale: int
    ) -> dict[str, Any]:
        count, height, width, _ = made.frames.shape
        about = {"file": target.video.name, "frames": count, "width": width, "height": height}
        return records.record(
            model=self.model,
            pipe=self.pipe,
            call=call,
            seed=self.seed,
            method=self.method if config is not None else NONE,
            config=config,
            made=made,
            video={**about, "fps": self.fps, "scale": scale},
            device=self.device,
            dtype=self.dtype,
            offload=self.offload,
            compiled=self.compiled,
        )
