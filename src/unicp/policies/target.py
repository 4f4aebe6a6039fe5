"""A speed that is asked for, shared out over a run: the threshold that just gives it, found anew at every recompute.
Ours, not a paper's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .windows import Place, Window

THRESHOLDS = tuple(10 ** (exponent / 24) for exponent in range(-96, 49))
"""What is tried, as a share of the limits: 1e-4 to 100."""
FIRST, LAST = 3.0, 2.0
"""How many times as large as in between errors are expected to be at the first and at the last step."""
FALLS, FALLEN, RISES = 0.15, 0.3, 0.9
"""Shares of the run: until where the first ones last, from where there are those in between, until where."""
MEMORY = 0.5
"""How much of the estimate of the errors' size a new measurement leaves as it was."""


def expected_shape(progress: float) -> float:
    """The U that the paper speaks of: how errors of fills compare over a run, whose share ``progress`` is over.

    What a run is expected to show, not what decides: its own measurements scale it, again and again.

    >>> expected_shape(0.0), expected_shape(0.5), expected_shape(1.0)
    (3.0, 1.0, 2.0)
    """
    falling = min(max((FALLEN - progress) / (FALLEN - FALLS), 0.0), 1.0)
    rising = min(max((progress - RISES) / (1 - RISES), 0.0), 1.0)
    return 1 + (FIRST - 1) * falling + (LAST - 1) * rising


@dataclass(kw_only=True)
class Target:
    """Decides on the recomputes of one shared window, so that the run takes so many times fewer operations.

    Attributes:
        speedup: how many times fewer.
        max_window: most steps in a row that are filled.
        cooldown: last steps that are computed.
        saved: share of a step's operations that filling saves.
        spent: what was computed so far, in whole steps.
        size: of the errors: that of a fill one step behind its anchor, as a share of the limit, over its expected
            shape.
        reachable: the speed that is possible, if it is less than what was asked for.
    """

    speedup: float
    max_window: int
    cooldown: int
    saved: float = 0.0
    spent: float = 0.0
    size: float | None = None
    reachable: float | None = None

    def note(self, error: float, progress: float) -> None:
        """Take note of a measured error: of one step behind the anchor, as a share of the limit."""
        if not (math.isfinite(error) and error > 0):
            return
        new = math.log(error / expected_shape(progress))
        self.size = new if self.size is None else MEMORY * self.size + (1 - MEMORY) * new

    def due(self, window: Window, here: Place, steps: int, first: int, places: Sequence[Place]) -> int:
        """The next step at which the window's units are computed.

        Args:
            window: its newest anchor is the step before ``here``.
            here: the step that is decided on.
            steps: of the run.
            first: the first of this denoiser's steps.
            places: of all steps; needed where errors are calibrated.
        """
        if window.rows is None and self.size is None:
            return here.index  # nothing was measured yet
        left = (steps - first) / self.speedup - self.spent
        computed = (left - (steps - here.index) * (1 - self.saved)) / self.saved if self.saved else math.inf
        error = self._calibrated(window, places) if window.rows is not None else self._measured(window, steps, first)
        start = window.anchors[0].index
        spacing = start - window.anchors[1].index if len(window.anchors) > 1 else 1
        for threshold in (0.0, *THRESHOLDS, math.inf):
            found = self._played(start, spacing, steps, error, threshold)
            if sum(step >= here.index for step in found) <= computed + 1e-6:
                break
        else:
            if self.reachable is None:
                full = sum(step >= here.index for step in found)
                total = self.spent + full * self.saved + (steps - here.index) * (1 - self.saved)
                self.reachable = (steps - first) / total
        return found[0] if found else steps

    def _played(
        self, start: int, spacing: int, steps: int, error: Callable[[int, int, int], float], threshold: float
    ) -> list[int]:
        """The steps after ``start`` that would be computed."""
        last, found, at = steps - self.cooldown, [], start
        while at < steps:
            length = 1
            while length <= self.max_window and at + length < last and error(at, spacing, length + 1) <= threshold:
                length += 1
            at, spacing = at + length, length
            found.append(at)
        return [step for step in found if step < steps]

    def _measured(self, window: Window, steps: int, first: int) -> Callable[[int, int, int], float]:
        size = math.exp(self.size) if self.size is not None else math.inf

        def error(at: int, spacing: int, length: int) -> float:
            ahead = length * (length + spacing) / 2 if window.forecasts else length
            return size * expected_shape((at - first) / max(steps - first - 1, 1)) * ahead

        return error

    def _calibrated(self, window: Window, places: Sequence[Place]) -> Callable[[int, int, int], float]:
        def error(at: int, spacing: int, length: int) -> float:
            now = min(at + length - 1, len(places) - 1)  # the last step that is filled
            anchors = [places[at], places[max(at - spacing, 0)]]
            return window.calibrated(places[now], anchors) / window.limit

        return error
