"""The clips of ``unicp batch``: how a worker makes them with a pipeline, and what they are to be."""

from __future__ import annotations

import gc
import inspect
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import video
from ..batch.clips import Clip, Rendered
from ..batch.manifest import digest
from ..bench.harness import Made
from ..policies import Config, config_from_dict
from . import calls, options, pipelines, records
from .pipelines import Model

BYTES_PER_PIXEL = 0.25
"""Of a compressed video, a generous guess for the check of the disk ahead; other formats take more."""
RECORD_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class PipelineRecipe:
    """Makes clips with a diffusers pipeline.

    Attributes:
        dtype, device: as the user wrote them; ``None`` is the worker's own choice.
        scale: see :class:`~unicp.cli.jobs.Job`.
        threads: of a worker on a CPU; ``None`` leaves torch's own number.
    """

    model: Model
    dtype: str | None = None
    scale: int | None = None
    threads: int | None = None

    def load(self, device: str | None) -> PipelineMaker:
        """Load the pipeline, on this worker's first device unless another is named."""
        import torch

        place, number = options.read_device(device, self.dtype)
        if place.type == "cuda" and place.index is not None:
            torch.cuda.set_device(place)  # else every worker would also hold a little of the first GPU
        if place.type == "cpu" and self.threads:
            torch.set_num_threads(self.threads)
        return PipelineMaker(self, pipelines.load(self.model, place, number), place, number)


class PipelineMaker:
    """A loaded pipeline."""

    def __init__(self, recipe: PipelineRecipe, pipe: Any, device: Any, dtype: Any) -> None:
        self._recipe, self._pipe, self._device, self._dtype = recipe, pipe, device, dtype

    def document(self, values: Mapping[str, Any]) -> str:
        return records.dumps(values)

    def make(self, clips: Sequence[Clip]) -> list[Rendered | Exception]:
        """Clips of one group, in one forward. Each has a generator of its own, seeded as if it were alone."""
        values = clips[0].values
        config = config_from_dict(values["config"]) if values["config"] is not None else None
        calls.check_shape(self._pipe, values["call"])
        if self._recipe.model.is_demo:
            said = [str(clip.values["call"].get("negative_prompt") or "") for clip in clips]
            pipelines.warn_of_unknown_words(self._pipe, [*(clip.prompt for clip in clips), *said])
        try:
            made, frames = self._run(clips, config)
        except Exception:
            self._free()
            raise
        return [
            self._rendered(clip, clips, position, frames[position], made, config) for position, clip in enumerate(clips)
        ]

    def _free(self) -> None:
        import torch

        gc.collect()
        if torch.cuda.is_available():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.cuda.empty_cache()

    def _run(self, clips: Sequence[Clip], config: Config | None) -> tuple[Made, Any]:
        """One call of the pipeline: what it took, and the frames of all clips (B, F, H, W, 3)."""
        import numpy as np
        import torch

        from ..session import DENOISERS, accelerate

        pipe, alone = self._pipe, len(clips) == 1
        call = dict(clips[0].values["call"])
        if clips[0].values["image"] is not None:
            call["image"] = _image(clips[0].values["image"])
        generators = [torch.Generator().manual_seed(clip.seed) for clip in clips]
        prompts = [clip.prompt for clip in clips]
        extra: dict[str, Any] = {
            "prompt": prompts[0] if alone else prompts,
            "generator": generators[0] if alone else generators,
            "output_type": "np",
        }
        if not alone and "negative_prompt" in call:
            extra["negative_prompt"] = [clip.values["call"]["negative_prompt"] for clip in clips]
        watch = _Watch()
        with ExitStack() as stack:
            session = stack.enter_context(accelerate(pipe, config)) if config is not None else None
            if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
                extra["callback_on_step_end"] = watch.step_end
            for module in (getattr(pipe, name, None) for name in DENOISERS):
                if isinstance(module, torch.nn.Module):
                    stack.callback(module.register_forward_pre_hook(watch.start).remove)
            began = _now()
            output = pipe(**{**call, **extra})
            total = _now() - began
            report = session.report() if session is not None else None
        frames = getattr(output, "frames", None)
        if frames is None or len(frames) != len(clips) or np.ndim(frames[0]) != 4:
            raise RuntimeError(f"{type(pipe).__name__} returned no video")
        loop = watch.ended - watch.began if watch.began is not None and watch.ended is not None else total
        made = Made(frames=None, steps=watch.steps, loop_seconds=loop, total_seconds=total, report=report)
        return made, frames

    def _rendered(
        self, clip: Clip, clips: Sequence[Clip], position: int, frames: Any, made: Made, config: Config | None
    ) -> Rendered | Exception:
        import numpy as np

        frames = np.asarray(frames, dtype=np.float32)
        if not np.isfinite(frames).all():
            return RuntimeError(
                "the video holds values that are not numbers; try --dtype float32, or a lower --guidance"
            )
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
        if len(clips) > 1:  # timings and report are of all of them
            others = [{"prompt": each.prompt, "seed": each.seed} for each in clips]
            record["clip"] = {"batch": others, "position": position}
        fraction = made.report.computed_fraction if made.report is not None else 1.0
        return Rendered(frames=frames, fps=fps, scale=scale, record=record, fraction=fraction)


class _Watch:
    """Times the denoising loop."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.ended: float | None = None
        self.steps = 0

    def start(self, *_: Any) -> None:
        """Before a denoiser runs."""
        if self.began is None:
            self.began = _now()

    def step_end(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's ``callback_on_step_end``."""
        self.steps = index + 1
        if self.steps == len(pipe.scheduler.timesteps):
            self.ended = _now()
        return tensors


def _now() -> float:
    """Seconds, once everything that was queued on an accelerator is done."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _image(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB")


def expected_bytes(model: Model, call: Mapping[str, Any], suffix: str) -> int:
    """A guess at the size of a clip's files: from the call, else from the pipeline's defaults."""
    takes = inspect.signature(model.pipeline.__call__).parameters
    pixels = 1.0
    for words in (("width",), ("height",), calls.ARGUMENTS["--frames"]):
        default = next((takes[word].default for word in words if word in takes), None)
        value = next((call[word] for word in words if call.get(word)), default)
        pixels *= value if isinstance(value, int | float) else 512
    return math.ceil(pixels * BYTES_PER_PIXEL * (1 if suffix == ".mp4" else 4)) + RECORD_BYTES


def identity(model: Model) -> str:
    """What a model is called in the key of a clip: the same wherever the command was typed."""
    if model.is_demo or model.revision is not None or model.offline:
        return f"{model.name}@{model.revision}" if model.revision else model.name
    return str(Path(model.source).absolute())


def of_content(config: Config | None) -> dict[str, Any] | None:
    """A config's values for the key of a clip; a profile counts by its content, wherever it lies."""
    if config is None:
        return None
    values = config.to_dict()
    if isinstance(values.get("profile"), str):
        values["profile"] = digest(Path(values["profile"]))
    if isinstance(values.get("stack"), dict) and isinstance(values["stack"].get("profile"), str):
        values["stack"] = {**values["stack"], "profile": digest(Path(values["stack"]["profile"]))}
    return values


def absolute(config: Config | None) -> Config | None:
    """A config whose profile is found from any current folder: those of workers may be others."""
    profile = getattr(config, "profile", None)
    if config is None or profile is None:
        return config
    return config.replace(profile=str(Path(profile).absolute()))
