"""Making one video: the call, the progress it shows, and how long it took."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ..policies import Config
from ..report import SessionReport, StepRecord
from .screen import Steps, steps

DONE = {"compute": "computed", "reuse": "reused", "forecast": "forecast", "partial": "partial"}
"""How progress says what a step did."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """One video and what making it took.

    Attributes:
        frames: (F, H, W, 3), float32 in [0, 1].
        steps: denoising steps.
        loop_seconds: the denoising loop, from the first call of a denoiser to the end of the last step.
        total_seconds: the pipeline's whole call, with text encoding and decoding.
        report: ``None`` where nothing was accelerated.
    """

    frames: Any
    steps: int
    loop_seconds: float
    total_seconds: float
    report: SessionReport | None


def _now() -> float:
    """Seconds, once everything that was queued on an accelerator is done."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class _Watch:
    """Follows a call: times its denoising loop and shows its steps."""

    def __init__(self, pipe: Any, session: Any, shown: Steps) -> None:
        self._pipe, self._session, self._shown = pipe, session, shown
        self.began: float | None = None
        self.ended: float | None = None
        self.steps = 0

    def start(self, *_: Any) -> None:
        """Before a denoiser runs."""
        if self.began is None:
            self.began = _now()

    def finish(self, *_: Any) -> None:
        """After a denoiser ran, where the pipeline does not say when a step ends."""
        self.ended = _now()
        self.steps = len(getattr(self._pipe.scheduler, "timesteps", ()))

    def step_end(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's ``callback_on_step_end``."""
        self.steps = index + 1
        total = len(pipe.scheduler.timesteps)
        last = self.steps == total
        if last:
            self.ended = _now()
        records = self._session.records if self._session is not None else []
        latest = [record for record in records if record.index == index]
        self._shown.show(self.steps, total, self._sigma(index, latest), "decoding" if last else _done(latest))
        return tensors

    def _sigma(self, index: int, records: list[StepRecord]) -> float | None:
        if records:
            return records[-1].sigma
        sigmas = getattr(self._pipe.scheduler, "sigmas", None)
        return float(sigmas[index]) if sigmas is not None and len(sigmas) > index else None


def _done(records: list[StepRecord]) -> str:
    """In a word what the calls of one step did; the guidance branches may differ."""
    actions = list(dict.fromkeys(record.action for record in records)) or ["compute"]
    return "+".join(DONE[action] for action in actions)


def make(pipe: Any, call: Mapping[str, Any], *, seed: int, config: Config | None, title: str) -> Made:
    """Generate one video.

    The noise is drawn on the CPU from ``seed``, so that it is the same on every device.

    Raises:
        RuntimeError: the pipeline returned no video, or one that holds values that are not numbers.
    """
    import numpy as np
    import torch

    from ..session import DENOISERS, accelerate

    with ExitStack() as stack:
        session = stack.enter_context(accelerate(pipe, config)) if config is not None else None
        shown = stack.enter_context(steps(title, call.get("num_inference_steps")))
        watch = _Watch(pipe, session, shown)
        extra: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "output_type": "np"}
        says_steps = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
        if says_steps:
            extra["callback_on_step_end"] = watch.step_end
        for module in (getattr(pipe, name, None) for name in DENOISERS):
            if isinstance(module, torch.nn.Module):
                stack.callback(module.register_forward_pre_hook(watch.start).remove)
                if not says_steps:
                    stack.callback(module.register_forward_hook(watch.finish).remove)
        began = _now()
        output = pipe(**call, **extra)
        total = _now() - began
    # Out of the progress bar: the session may have a warning to give.
    report = session.report() if session is not None else None
    frames = getattr(output, "frames", None)
    if frames is None or not len(frames) or np.ndim(frames[0]) != 4:
        raise RuntimeError(f"{type(pipe).__name__} returned no video")
    frames = np.asarray(frames[0], dtype=np.float32)
    if not np.isfinite(frames).all():
        raise RuntimeError("the video holds values that are not numbers; try --dtype float32, or a lower --guidance")
    loop = watch.ended - watch.began if watch.began is not None and watch.ended is not None else total
    return Made(frames=frames, steps=watch.steps, loop_seconds=loop, total_seconds=total, report=report)
