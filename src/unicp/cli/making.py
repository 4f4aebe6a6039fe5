"""How a worker of ``unicp batch`` makes clips with a pipeline."""

from __future__ import annotations

import datetime
import gc
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..batch.clips import Clip, Rank, Rendered
from ..bench import harness
from ..bench.harness import Made
from ..errors import UnicpError
from ..files import video
from ..hosts.diffusers.session import Session, accelerate
from ..policies.config import Config, config_from_dict
from . import calls, options, pipelines, records
from .model import Model

TIMEOUT = datetime.timedelta(minutes=10)
"""How long ranks wait for each other, as they may load at different speeds, and one of them may hang."""
UNEVEN_TOKENS_MESSAGE = "must be divisible by mesh size"
"""Part of diffusers' error message for tokens that cannot be divided evenly."""


@dataclass(frozen=True, kw_only=True)
class PipelineRecipe:
    """Makes clips with a diffusers pipeline.

    Attributes:
        dtype, device: as the user wrote them; ``None`` leaves the choice to the worker.
        scale: see :class:`~unicp.cli.jobs.Job`.
        threads: CPU threads of a worker on a CPU; ``None`` leaves torch's own number.
    """

    model: Model
    dtype: str | None = None
    scale: int | None = None
    threads: int | None = None

    def load(self, device: str | None, rank: Rank | None = None) -> PipelineMaker:
        """Load the pipeline on this worker's first device, or a named one; with ``rank``, share tokens among all."""
        import torch

        place, number = options.read_device(device, self.dtype)
        if place.type == "cuda" and place.index is not None:
            torch.cuda.set_device(place)  # otherwise every worker would also hold some memory of the first GPU
        if place.type == "cpu" and self.threads:
            torch.set_num_threads(self.threads)
        if rank is None:
            return PipelineMaker(self, pipelines.load(self.model, place, number), place, number)
        import torch.distributed as dist

        from ..hosts.diffusers import parallel

        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            init_method=f"file://{rank.meeting}",
            rank=rank.number,
            world_size=rank.size,
            timeout=TIMEOUT,
        )
        pipe = pipelines.load(self.model, place, number)
        parallel.spread(list(harness.denoisers_of(pipe).values()), place)
        return PipelineMaker(self, pipe, place, number, rank)


class PipelineMaker:
    """A loaded pipeline."""

    def __init__(self, recipe: PipelineRecipe, pipe: Any, device: Any, dtype: Any, rank: Rank | None = None) -> None:
        self._recipe, self._pipe, self._device, self._dtype = recipe, pipe, device, dtype
        self._ranks = 1 if rank is None else rank.size
        self._session: Session | None = None

    def document(self, values: Mapping[str, Any]) -> str:
        return records.dumps(values)

    def make(self, clips: Sequence[Clip]) -> list[Rendered | Exception]:
        """Make clips of one group in one forward. Each has a generator of its own, seeded as if it were alone."""
        values = clips[0].values
        config = config_from_dict(values["config"]) if values["config"] is not None else None
        calls.check_shape(self._pipe, values["call"])
        if self._recipe.model.is_demo:
            said = [str(clip.values["call"].get("negative_prompt") or "") for clip in clips]
            pipelines.warn_of_unknown_words(self._pipe, [*(clip.prompt for clip in clips), *said])
        try:
            made, frames = self._run(clips, config)
        except BaseException as error:
            self._accelerated(None)  # frees what a video that broke off has kept
            self._free()
            if UNEVEN_TOKENS_MESSAGE in str(error):
                raise UnicpError(
                    f"the tokens of this clip cannot be shared evenly by {self._ranks} devices; choose another --size "
                    "or --frames"
                ) from error
            raise
        return [
            self._rendered(clip, clips, position, frames[position], made, config) for position, clip in enumerate(clips)
        ]

    def _accelerated(self, config: Config | None) -> Session | None:
        """The session for the clips to come; it is made anew only if their config differs from the last."""
        if self._session is not None and self._session.config == config:
            self._session.warn_again()
            return self._session
        if self._session is not None:
            self._session.restore()
            self._session = None
        if config is not None:
            self._session = accelerate(self._pipe, config)
        return self._session

    def _free(self) -> None:
        import torch

        gc.collect()
        if torch.cuda.is_available():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.cuda.empty_cache()

    def _run(self, clips: Sequence[Clip], config: Config | None) -> tuple[Made, list[Any]]:
        """Call the pipeline once. Returns what the call took, and the frames (F, H, W, 3) of each clip."""
        import torch

        alone = len(clips) == 1
        call = dict(clips[0].values["call"])
        if clips[0].values["image"] is not None:
            call["image"] = _image(clips[0].values["image"])
        generators = [torch.Generator().manual_seed(clip.seed) for clip in clips]
        prompts = [clip.prompt for clip in clips]
        call["prompt"] = prompts[0] if alone else prompts
        if not alone and "negative_prompt" in call:
            call["negative_prompt"] = [clip.values["call"]["negative_prompt"] for clip in clips]
        session = self._accelerated(config)
        videos, made = harness.run(self._pipe, call, generator=generators[0] if alone else generators)
        report = session.report() if session is not None else None
        return replace(made, report=report), harness.frames_of(self._pipe, videos, len(clips))

    def _rendered(
        self, clip: Clip, clips: Sequence[Clip], position: int, frames: Any, made: Made, config: Config | None
    ) -> Rendered | Exception:
        try:
            harness.check_numbers(frames)
        except RuntimeError as error:
            return error
        count, height, width, _ = frames.shape
        suffix = Path(clip.name).suffix.lower()
        scale = self._recipe.scale or video.default_scale(height, width, suffix)
        fps = clip.values["fps"]
        call = {"prompt": clip.prompt, **clip.values["call"]}
        if clip.values["image"] is not None:
            call["image"] = clip.values["image"]
        about = {"frames": count, "width": width, "height": height, "fps": fps, "scale": scale}
        record = records.record(
            model=self._recipe.model,
            pipe=self._pipe,
            call=call,
            seed=clip.seed,
            method=clip.values["method"],
            config=config,
            made=made,
            video=about,
            device=self._device,
            dtype=self._dtype,
        )
        if len(clips) > 1:  # timings and report cover all of them together
            others = [{"prompt": each.prompt, "seed": each.seed} for each in clips]
            record["clip"] = {"batch": others, "position": position}
        if self._ranks > 1:
            record["clip"] = {"devices": self._ranks}
        fraction = made.report.computed_fraction if made.report is not None else 1.0
        return Rendered(frames=frames, fps=fps, scale=scale, record=record, fraction=fraction)


def _image(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB")
