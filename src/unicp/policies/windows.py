"""Windows of UniCP: for how many steps what was computed last stands in (EDCW; the details reconstructed, or ours).

A speed that is asked for is shared out over the run (:class:`Target`): the threshold that just gives it is found anew
at every recompute. That is ours, not a paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .base import Step
from .unit_errors import Rows, UnitErrors, error_after, shared_error

THRESHOLDS = tuple(10 ** (exponent / 24) for exponent in range(-96, 49))
"""What is tried, as a share of the limits: 1e-4 to 100."""
FIRST_ERROR_RATIO, LAST_ERROR_RATIO = 3.0, 2.0
"""How many times as large as in between errors are expected to be at the first and at the last step."""
FALLING_FROM, FALLING_UNTIL, RISING_FROM = 0.15, 0.3, 0.9
"""Shares of the run: until where the first ones last, from where there are those in between, until where."""
INERTIA = 0.5
"""How much of the estimate of the errors' size a new measurement leaves as it was."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a step lies.

    Attributes:
        index: denoising step.
        level: its noise level, or minus its index where nobody tells those of the others.
        levels: those of all steps, falling.
        calibrated: its place among a calibration's steps, as a fractional index.
    """

    index: int
    level: float
    levels: tuple[float, ...] | None = None
    calibrated: float = 0.0

    @classmethod
    def of(cls, step: Step, errors: UnitErrors | None) -> Place:
        """Where a step lies; among those of a profile, if there is one."""
        calibrated = errors.place(step.index, step.count, step.sigma) if errors is not None else 0.0
        level = step.sigma if step.sigmas is not None else -float(step.index)
        return cls(index=step.index, level=level, levels=step.sigmas, calibrated=calibrated)

    def level_after(self, steps: int) -> float:
        """The level so many steps later; 0, where the run is over."""
        if self.levels is None:
            return self.level - steps
        return self.levels[self.index + steps] if self.index + steps < len(self.levels) else 0.0


@dataclass(kw_only=True, eq=False)
class Window:
    """The window of one unit, or of units that share it.

    Attributes:
        members: those units.
        limit: error that a fill may cause, of the first of them; those of others are scaled to it.
        rows: calibrated errors (:class:`UnitErrors`), if there are any.
        forecasts: fills are forecasts from two computed outputs, not the last one.
        anchors: where all of them were computed last, newest first.
        open: profiled: the window that began there has not met an error above the limit.
        length: online: steps from there to the next recompute.
    """

    members: tuple[str, ...]
    limit: float
    rows: Rows | None = None
    forecasts: bool = False
    anchors: list[Place] = field(default_factory=list)
    open: bool = False
    length: int = 1
    due: int = 0

    @property
    def ready(self) -> bool:
        """Whether there is enough to fill from."""
        return len(self.anchors) > self.forecasts

    def renew(self, place: Place) -> None:
        """All members are computed: a window begins."""
        if self.anchors and self.anchors[0].level == place.level:  # a noise level that is visited twice
            del self.anchors[0]
        self.anchors = [place, *self.anchors[:2]]
        self.open = True

    def calibrated(self, now: Place, anchors: Sequence[Place] = ()) -> float:
        """The calibrated error of a fill; infinite where it is not known.

        Args:
            now: where it is filled.
            anchors: from where, newest first; from what is kept if there are none.
        """
        anchors = anchors or self.anchors
        if self.rows is None or len(anchors) <= self.forecasts:
            return float("inf")
        anchor = anchors[0].calibrated
        spacing = anchor - anchors[1].calibrated if self.forecasts else None
        return error_after(self.rows, anchor, now.calibrated, spacing)

    def measured(self, found: Sequence[tuple[float, int, float]], longest: int) -> float:
        """Set the window by what was measured where it began: as long as its expected error stays within the limit.

        It grows by one at most. The error of an old output is expected to grow with the steps; that of a line through
        two outputs as its remainder does, with the product of the distances to both.

        Args:
            found: of each member its own limit, steps since it was computed before, and the error that a fill from
                then would have had.
            longest: most steps to the next recompute.

        Returns:
            The error that is expected of the next step, as a share of the limit.
        """
        error = shared_error(self.limit, ((own, change) for own, _, change in found))
        each = shared_error(self.limit, ((own, change / age) for own, age, change in found))
        here = self.anchors[0]

        def expected(steps: int) -> float:
            return each * steps if not self.forecasts else error * self._remainder(steps)

        length = 1
        if error <= self.limit and (not self.forecasts or len(self.anchors) > 2):
            length = min(self.length + 1, longest)  # a spike, or no number, starts again from one
            while length > 1 and expected(length) > self.limit:
                length -= 1
        self.length, self.due = length, here.index + length
        return (error if self.forecasts else each) / self.limit

    def _remainder(self, steps: int) -> float:
        """How many times the error just measured a forecast has, so many steps later."""
        newest, before, oldest = self.anchors
        later = newest.level_after(steps)
        now = (before.level - newest.level) * (oldest.level - newest.level)
        return (newest.level - later) * (before.level - later) / now


def expected_shape(progress: float) -> float:
    """The U that the paper speaks of: how errors of fills compare over a run, whose share ``progress`` is over.

    What a run is expected to show, not what decides: its own measurements scale it, again and again.

    >>> expected_shape(0.0), expected_shape(0.5), expected_shape(1.0)
    (3.0, 1.0, 2.0)
    """
    falling = min(max((FALLING_UNTIL - progress) / (FALLING_UNTIL - FALLING_FROM), 0.0), 1.0)
    rising = min(max((progress - RISING_FROM) / (1 - RISING_FROM), 0.0), 1.0)
    return 1 + (FIRST_ERROR_RATIO - 1) * falling + (LAST_ERROR_RATIO - 1) * rising


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
        self.size = new if self.size is None else INERTIA * self.size + (1 - INERTIA) * new

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
