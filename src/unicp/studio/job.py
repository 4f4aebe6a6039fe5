"""A request that is being worked on, and its result."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..bench.harness import Made
from ..engine.report import StepRecord
from .request import Prepared, Request

WAITING, LOADING, WARMING, PLAIN, FAST, DONE, CANCELLED, FAILED = (
    "waiting",
    "loading the model",
    "warming up",
    "unaccelerated",
    "accelerated",
    "done",
    "cancelled",
    "failed",
)
"""States of a job, in their order; the last three are final."""
FINAL = (DONE, CANCELLED, FAILED)


class Cancelled(Exception):
    """Raised when a job was cancelled on its page."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Both videos of a request, and the measurements.

    Attributes:
        made, plain: the accelerated video and the unaccelerated one.
        kept: whether an earlier job made the unaccelerated one.
        psnr, ssim, motion_ratio: metrics of the accelerated video against the other (:mod:`unicp.tensors.metrics`).
    """

    request: Request
    prepared: Prepared
    made: Made
    plain: Made
    kept: bool
    psnr: float
    ssim: float
    motion_ratio: float
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """Speed-up of the denoising loop by wall clock."""
        return self.plain.loop_seconds / self.made.loop_seconds


@dataclass(eq=False)
class Job:
    """A request that is being worked on. The workshop's thread writes it, and pages read it.

    Attributes:
        steps, total: denoising steps of the video in progress.
        records: records of the accelerated video so far.
        began: time at which the present state began, by the monotonic clock.
        error: why it failed, in sentences.
    """

    request: Request
    state: str = WAITING
    steps: int = 0
    total: int = 0
    records: Sequence[StepRecord] = ()
    began: float = field(default_factory=time.monotonic)
    result: Result | None = None
    error: str = ""
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def over(self) -> bool:
        return self.state in FINAL

    def cancel(self) -> None:
        """Stop after the denoising step that is running."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether it was cancelled while a step is still running."""
        return self._stop.is_set() and not self.over

    def enter(self, state: str, total: int = 0) -> None:
        self.steps, self.total, self.began = 0, total, time.monotonic()
        self.state = state

    def check(self) -> None:
        """Raises: Cancelled: it is to stop."""
        if self._stop.is_set():
            raise Cancelled
