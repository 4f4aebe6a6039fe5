"""Generates one video and times it fairly: the device is synchronised at every mark, and nothing is counted twice."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ..engine.report import SessionReport
from ..hosts.diffusers.components import DENOISERS


@dataclass(frozen=True, kw_only=True)
class Made:
    """One video and the cost of making it.

    Attributes:
        frames: (F, H, W, 3), float32 in [0, 1].
        steps: denoising steps.
        loop_seconds: seconds of the denoising loop, from the first call of a denoiser to the end of the last step.
        total_seconds: seconds of the pipeline's whole call, with text encoding and decoding.
        report: report of unicp; ``None`` if it was not in force.
        latents: final latents on the CPU in float32, in the pipeline's own shape; ``None`` if it does not give them.
        peak_bytes: most memory that the denoising loop took on a CUDA device, beyond what was held before the call;
            ``None`` elsewhere (:mod:`unicp.bench.observe` counts tensors on any device).
    """

    frames: Any
    steps: int
    loop_seconds: float
    total_seconds: float
    report: SessionReport | None
    latents: Any = None
    peak_bytes: int | None = None


def accelerator_of(pipe: Any) -> Any:
    """The accelerator that a pipeline runs on, which need not be the current one; ``None`` if it runs on none."""
    from ..tensors.host import accelerator

    current = accelerator()
    device: Any = getattr(pipe, "_execution_device", None) or current
    return device if current is not None and device.type == current.type else None


def now(pipe: Any = None) -> float:
    """Time in seconds, taken once everything that was queued on the pipeline's accelerator is done."""
    import torch

    device = accelerator_of(pipe)
    if device is not None:
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def denoisers_of(pipe: Any) -> dict[str, Any]:
    """The denoisers of a pipeline by name."""
    import torch

    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: module for name, module in found.items() if isinstance(module, torch.nn.Module)}


def step_count(pipe: Any, call: Mapping[str, Any]) -> int:
    """Number of denoising steps that a call asks for, or else the pipeline's default."""
    default = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return int(call.get("num_inference_steps", default))


def rounds(pipe: Any) -> int:
    """Number of denoising steps of the call in progress.

    It can differ from the scheduler's: a video that begins in the middle has fewer, and one whose frames are denoised
    one after another has more.
    """
    return getattr(pipe, "num_timesteps", None) or len(getattr(pipe.scheduler, "timesteps", ()))


@dataclass
class Watch:
    """Follows a call of a pipeline. ``on_step(pipe, done, total)`` is called after every step."""

    pipe: Any
    on_step: Callable[[Any, int, int], None] | None = None
    began: float | None = None
    ended: float | None = None
    steps: int = 0
    latents: Any = field(default=None, repr=False)
    held: int = 0
    peak_bytes: int | None = None

    def mark_memory(self) -> None:
        """Called just before the pipeline's call."""
        import torch

        if torch.cuda.is_available():
            device = accelerator_of(self.pipe)
            torch.cuda.reset_peak_memory_stats(device)
            self.held = torch.cuda.memory_allocated(device)

    def start(self, *_: Any) -> None:
        """Called before a denoiser runs."""
        if self.began is None:
            self.began = now(self.pipe)

    def finish(self, *_: Any) -> None:
        """Called after a denoiser ran, if the pipeline does not tell when a step ends."""
        self._end()
        self.steps = rounds(self.pipe)

    def _end(self) -> None:
        import torch

        self.ended = now(self.pipe)
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated(accelerator_of(self.pipe)) - self.held

    def step_end(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's ``callback_on_step_end``."""
        self.steps = index + 1
        total = rounds(pipe)
        if self.steps == total:
            self._end()
            self.latents = tensors.get("latents")
        if self.on_step is not None:
            self.on_step(pipe, self.steps, total)
        return tensors

    @property
    def loop_seconds(self) -> float | None:
        return self.ended - self.began if self.began is not None and self.ended is not None else None


def run(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    generator: Any,
    on_step: Callable[[Any, int, int], None] | None = None,
    output_type: str = "np",
) -> tuple[Any, Made]:
    """Call the pipeline as it is, and time the call.

    Args:
        pipe: the pipeline.
        call: arguments of its call.
        generator: random generator, or a list with one for each video.
        on_step: called after every step with the pipeline, the steps done and the number of all steps.
        output_type: as for the pipeline's call.

    Returns:
        The videos of the call as the pipeline gives them (``None`` if it gives none), and the cost of all of them
        together, without frames.
    """
    with ExitStack() as stack:
        watch = Watch(pipe, on_step)
        extra: dict[str, Any] = {"generator": generator, "output_type": output_type}
        says_steps = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
        if says_steps:
            extra["callback_on_step_end"] = watch.step_end
        for module in denoisers_of(pipe).values():
            stack.callback(module.register_forward_pre_hook(watch.start).remove)
            if not says_steps:
                stack.callback(module.register_forward_hook(watch.finish).remove)
        watch.mark_memory()
        began = now(pipe)
        output = pipe(**call, **extra)
        total = now(pipe) - began
    return getattr(output, "frames", None), Made(
        frames=None,
        steps=watch.steps,
        loop_seconds=total if watch.loop_seconds is None else watch.loop_seconds,
        total_seconds=total,
        report=None,
        latents=None if watch.latents is None else watch.latents.detach().float().cpu(),
        peak_bytes=watch.peak_bytes,
    )


def frames_of(pipe: Any, videos: Any, count: int = 1) -> list[Any]:
    """The ``count`` videos of a call, each (F, H, W, 3) in float32.

    Raises:
        RuntimeError: the pipeline did not return them.
    """
    import numpy as np

    if videos is None or len(videos) != count or np.ndim(videos[0]) != 4:
        raise RuntimeError(f"{type(pipe).__name__} returned no video")
    return [np.asarray(video, dtype=np.float32) for video in videos]


def check_numbers(frames: Any) -> None:
    """Refuse a video (F, H, W, 3) with values that are not finite numbers.

    Raises:
        RuntimeError: the video has such values.
    """
    import numpy as np

    if not np.isfinite(frames).all():
        raise RuntimeError("the video holds values that are not numbers; try --dtype float32, or a lower --guidance")


def generate(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    seed: int,
    on_step: Callable[[Any, int, int], None] | None = None,
) -> Made:
    """Generate one video with the pipeline as it is.

    The noise is drawn on the CPU from ``seed``, so that it is the same on every device.

    Args:
        pipe, call, on_step: see :func:`run`.
        seed: seed of the noise.

    Raises:
        RuntimeError: the pipeline returned no video, or one that holds values that are not numbers.
    """
    import torch

    videos, made = run(pipe, call, generator=torch.Generator().manual_seed(seed), on_step=on_step)
    (frames,) = frames_of(pipe, videos)
    check_numbers(frames)
    return dataclasses.replace(made, frames=frames)
