"""One generated video, timed fairly: the device is synchronised at every mark, nothing is counted twice."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ..report import SessionReport
from ..session import DENOISERS


@dataclass(frozen=True, kw_only=True)
class Made:
    """One video and what making it took.

    Attributes:
        frames: (F, H, W, 3), float32 in [0, 1].
        steps: denoising steps.
        loop_seconds: the denoising loop, from the first call of a denoiser to the end of the last step.
        total_seconds: the pipeline's whole call, with text encoding and decoding.
        report: ``None`` where nothing of unicp's was in force.
        latents: final latents on the CPU in float32, in the pipeline's own shape; ``None`` if it does not say them.
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


def now() -> float:
    """Seconds, once everything that was queued on an accelerator is done."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def denoisers_of(pipe: Any) -> dict[str, Any]:
    """The denoisers of a pipeline by name."""
    import torch

    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: module for name, module in found.items() if isinstance(module, torch.nn.Module)}


def step_count(pipe: Any, call: Mapping[str, Any]) -> int:
    """Denoising steps that a call asks for; the pipeline's default where it asks for none."""
    default = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return int(call.get("num_inference_steps", default))


@dataclass
class Watch:
    """Follows a call. ``on_step(pipe, done, total)`` is told of every finished step."""

    pipe: Any
    on_step: Callable[[Any, int, int], None] | None = None
    began: float | None = None
    ended: float | None = None
    steps: int = 0
    latents: Any = field(default=None, repr=False)
    held: int = 0
    peak_bytes: int | None = None

    def mark_memory(self) -> None:
        """Just before the call."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()

    def start(self, *_: Any) -> None:
        """Before a denoiser runs."""
        if self.began is None:
            self.began = now()

    def finish(self, *_: Any) -> None:
        """After a denoiser ran, where the pipeline does not say when a step ends."""
        self._end()
        self.steps = len(getattr(self.pipe.scheduler, "timesteps", ()))

    def _end(self) -> None:
        import torch

        self.ended = now()
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated() - self.held

    def step_end(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's ``callback_on_step_end``."""
        self.steps = index + 1
        total = len(pipe.scheduler.timesteps)
        if self.steps == total:
            self._end()
            self.latents = tensors.get("latents")
        if self.on_step is not None:
            self.on_step(pipe, self.steps, total)
        return tensors

    @property
    def loop_seconds(self) -> float | None:
        return self.ended - self.began if self.began is not None and self.ended is not None else None


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
        call: arguments of the pipeline's call.
        on_step: told of every finished step: pipeline, steps done, steps in all.

    Raises:
        RuntimeError: the pipeline returned no video, or one that holds values that are not numbers.
    """
    import numpy as np
    import torch

    with ExitStack() as stack:
        watch = Watch(pipe, on_step)
        extra: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "output_type": "np"}
        says_steps = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
        if says_steps:
            extra["callback_on_step_end"] = watch.step_end
        for module in denoisers_of(pipe).values():
            stack.callback(module.register_forward_pre_hook(watch.start).remove)
            if not says_steps:
                stack.callback(module.register_forward_hook(watch.finish).remove)
        watch.mark_memory()
        began = now()
        output = pipe(**call, **extra)
        total = now() - began
    frames = getattr(output, "frames", None)
    if frames is None or not len(frames) or np.ndim(frames[0]) != 4:
        raise RuntimeError(f"{type(pipe).__name__} returned no video")
    frames = np.asarray(frames[0], dtype=np.float32)
    if not np.isfinite(frames).all():
        raise RuntimeError("the video holds values that are not numbers; try --dtype float32, or a lower --guidance")
    latents = watch.latents
    return Made(
        frames=frames,
        steps=watch.steps,
        loop_seconds=total if watch.loop_seconds is None else watch.loop_seconds,
        total_seconds=total,
        report=None,
        latents=None if latents is None else latents.detach().float().cpu(),
        peak_bytes=watch.peak_bytes,
    )
